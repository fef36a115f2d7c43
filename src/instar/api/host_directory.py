"""What hosts are like now, for views and admin resources: one read of the hosts table, good for a second."""

from __future__ import annotations

import time

import msgspec

from instar.model.guest import HostInventory
from instar.scheduling.host_table import HostTable
from instar.store.aggregates import DEFAULT_ZONE
from instar.store.contract import Row, Store
from instar.store.hosts import host_list

FRESH_S = 1.0
_decode_inventory = msgspec.msgpack.Decoder(HostInventory).decode


class HostSeen(msgspec.Struct, frozen=True):
    """A host as the Compute API shows it. `status` is the server view's host_status; times are microseconds."""

    name: str
    service_id: str
    hypervisor_id: str
    hypervisor_hostname: str
    status: str  # UP | DOWN | MAINTENANCE
    is_up: bool
    disabled: bool
    disabled_reason: str | None
    forced_down: bool
    created_at: int
    reported_at: int
    inventory: HostInventory
    vcpus_claimed: int
    memory_claimed_mib: int
    disk_claimed_gib: int
    instances_claimed: int


class HostDirectory:
    """Hosts by name. Whether one is up is the host table's judgement: it hears the reports by its own clock."""

    def __init__(self, store: Store, table: HostTable) -> None:
        self._store = store
        self._table = table
        self._seen: dict[str, HostSeen] = {}
        self._read_at = -FRESH_S

    async def seen(self, *, fresh: bool = False) -> dict[str, HostSeen]:
        """All hosts, as they were at most a second ago (`fresh`: now)."""
        now = time.monotonic()
        if fresh or now - self._read_at >= FRESH_S:
            self._seen = {row["name"]: self._from_row(row) for row in await host_list(self._store)}
            self._read_at = now
        return self._seen

    async def changed(self) -> dict[str, HostSeen]:
        """An admin said something of a host: scheduler and views know at once, not after the next refresh."""
        await self._table.refresh()
        return await self.seen(fresh=True)

    async def deleted(self, host: str) -> None:
        """An admin deleted the host."""
        await self._table.forget(host)
        await self.seen(fresh=True)

    def zone_of(self, host: str) -> str:
        """The availability zone that a host is in now."""
        known = self._table.get(host)
        return known.zone if known else DEFAULT_ZONE

    def _from_row(self, row: Row) -> HostSeen:
        inventory = _decode_inventory(row["inventory"])
        disabled, forced_down = bool(row["disabled"]), bool(row["forced_down"])
        is_up = not forced_down and self._table.is_up(row["name"])
        return HostSeen(
            name=row["name"],
            service_id=row["service_id"],
            hypervisor_id=row["hypervisor_id"],
            hypervisor_hostname=inventory.hypervisor_hostname or row["name"],
            status="DOWN" if not is_up else "MAINTENANCE" if disabled else "UP",
            is_up=is_up,
            disabled=disabled,
            disabled_reason=row["disabled_reason"],
            forced_down=forced_down,
            created_at=row["created_at"],
            reported_at=row["reported_at"],
            inventory=inventory,
            vcpus_claimed=row["vcpus_claimed"],
            memory_claimed_mib=row["memory_claimed_mib"],
            disk_claimed_gib=row["disk_claimed_gib"],
            instances_claimed=row["instances_claimed"],
        )
