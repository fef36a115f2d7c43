"""A host as the scheduler sees it: one mutable record in memory, kept up to date by the host table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from instar.config import HostSettings, SchedulingSettings
from instar.model.guest import HostInventory
from instar.store.aggregates import DEFAULT_ZONE, Aggregate
from instar.store.contract import Row
from instar.store.hosts import Capacity

NO_CAPACITY = Capacity(0, 0, 0)


class HostView:
    """Free amounts are hints: what may be claimed is decided by the database. `heard_at` is when the receiver's own clock
    last showed a report of a working hypervisor, None when there was none since the start of this process; `reported_at`
    the same of any report."""

    __slots__ = (
        "agent_id",
        "agent_version",
        "boot_id",
        "busy",
        "capacity",
        "disabled",
        "disabled_reason",
        "disk_free_gib",
        "forced_down",
        "heard_at",
        "hypervisor_ok",
        "instances",
        "inventory",
        "is_up",
        "memory_free_mib",
        "metadata",
        "name",
        "protocol",
        "recorded",
        "reported_at",
        "session",
        "shut",
        "totals",
        "vcpus_free",
        "zone",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.inventory: HostInventory | None = None
        self.capacity = NO_CAPACITY
        self.totals = (0, 0, 0)  # claimed: vcpus, memory_mib, disk_gib
        self.vcpus_free = self.memory_free_mib = self.disk_free_gib = 0
        self.instances = 0
        self.busy = 0  # instances with an operation in flight
        self.disabled = False
        self.disabled_reason: str | None = None
        self.forced_down = False
        self.heard_at: float | None = None
        self.reported_at: float | None = None
        self.hypervisor_ok = False
        self.is_up = False  # as it was told last
        self.boot_id = self.agent_id = self.agent_version = ""
        self.session = 0  # what the host's reports said last, see HostReport
        self.protocol = 1
        self.shut = False
        self.zone = DEFAULT_ZONE
        self.metadata: Mapping[str, tuple[str, ...]] = {}  # of its aggregates: each key with all its values
        self.recorded: Recorded | None = None  # what was taken last, if nothing was noted since

    def set_amounts(self, capacity: Capacity, totals: tuple[int, int, int]) -> None:
        self.capacity, self.totals = capacity, totals
        self.vcpus_free = capacity.vcpus - totals[0]
        self.memory_free_mib = capacity.memory_mib - totals[1]
        self.disk_free_gib = capacity.disk_gib - totals[2]

    def take(self, recorded: Recorded) -> None:
        """The database says this now."""
        self.set_amounts(self.capacity, recorded.totals)
        self.instances, self.busy = recorded.instances, recorded.busy
        self.disabled, self.disabled_reason = recorded.disabled, recorded.disabled_reason
        self.forced_down = recorded.forced_down
        self.zone = recorded.grouping.zone if recorded.grouping else DEFAULT_ZONE
        self.metadata = recorded.grouping.metadata if recorded.grouping else {}
        self.recorded = recorded

    def hears(self, now: float, down_after_s: float) -> bool:
        """Up: reported lately by a working hypervisor, and no admin says otherwise. One that is shut is about to be
        admitted: who tells it something waits a moment."""
        return (
            self.heard_at is not None
            and self.hypervisor_ok
            and not self.forced_down
            and now - self.heard_at <= down_after_s
        )


def capacity_of(inventory: HostInventory, host: HostSettings, scheduling: SchedulingSettings) -> Capacity:
    """What may be claimed of an inventory: less the reserve, times the allocation ratios."""
    return Capacity(
        int(inventory.vcpus * scheduling.cpu_ratio),
        int(max(0, inventory.memory_mib - host.memory_reserved_mib) * scheduling.memory_ratio),
        int(max(0, inventory.disk_gib - host.disk_reserved_gib) * scheduling.disk_ratio),
    )


class Grouping(msgspec.Struct, frozen=True):
    """What aggregates say of one host."""

    zone: str
    metadata: dict[str, tuple[str, ...]]


class Recorded(NamedTuple):
    """What the database says of a host. Of ten thousand most say the same as a moment ago: to see that must be quick."""

    totals: tuple[int, int, int]
    instances: int
    disabled: bool
    disabled_reason: str | None
    forced_down: bool
    busy: int
    grouping: Grouping | None

    @classmethod
    def of(cls, row: Row, busy: int, grouping: Grouping | None) -> Recorded:
        """A row of `host_totals_list`, and the instances that have an operation in flight."""
        totals = (row["vcpus_claimed"], row["memory_claimed_mib"], row["disk_claimed_gib"])
        disabled, forced_down = bool(row["disabled"]), bool(row["forced_down"])
        return cls(totals, row["instances_claimed"], disabled, row["disabled_reason"], forced_down, busy, grouping)


def groupings(aggregates: list[Aggregate]) -> dict[str, Grouping]:
    """Host → its zone, and every value that its aggregates give to each key."""
    zones: dict[str, str] = {}
    values: dict[str, dict[str, tuple[str, ...]]] = {}
    for aggregate in aggregates:
        for host in aggregate.hosts:
            if aggregate.availability_zone:
                zones.setdefault(host, aggregate.availability_zone)
            of_host = values.setdefault(host, {})
            for key, value in aggregate.metadata.items():
                of_host[key] = (*of_host.get(key, ()), value)
    return {host: Grouping(zones.get(host, DEFAULT_ZONE), metadata) for host, metadata in values.items()}
