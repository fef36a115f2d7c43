"""The weighers: hosts in the order of their worth, kept sorted all the time, so that choosing among 10,000 is a short walk.

A host's worth does not depend on the request: each free amount is taken as a share of the largest capacity that any host
has, each operation in flight as a share of what a host works on at once; each times its weight. Only affinity depends on
the request, and it moves just the few hosts that have members of the group: `bonus` says by how much.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from instar.config import SchedulingSettings
from instar.scheduling.host_view import NO_CAPACITY, HostView
from instar.store.hosts import Capacity
from instar.store.server_groups import GroupHosts


class Ranking:
    """Hosts, best first; equal ones by name. `operations_max`: operations that one host works on at once."""

    def __init__(self, settings: SchedulingSettings, operations_max: int) -> None:
        self._settings = settings
        self._operations_max = operations_max
        self._order: list[tuple[float, str]] = []  # (minus worth, name)
        self._hosts: dict[str, HostView] = {}
        self._largest = NO_CAPACITY
        self._set_weights(Capacity(1, 1, 1))

    def put(self, host: HostView) -> None:
        """The host has its right place, whatever of it has changed. New hosts are added."""
        largest, mine = self._largest, host.capacity
        if mine.vcpus > largest.vcpus or mine.memory_mib > largest.memory_mib or mine.disk_gib > largest.disk_gib:
            self._hosts[host.name] = host
            self._rescale()
            return
        rank = (-self.worth(host), host.name)
        if rank == host.rank:
            return
        if host.rank is not None:
            del self._order[bisect_left(self._order, host.rank)]
        self._hosts[host.name] = host
        insort(self._order, rank)
        host.rank = rank

    def remove(self, host: HostView) -> None:
        if host.rank is not None:
            del self._order[bisect_left(self._order, host.rank)]
            del self._hosts[host.name]
            host.rank = None

    def worth(self, host: HostView) -> float:
        by_cpu, by_memory, by_disk, by_io = self._weights
        return (
            host.vcpus_free * by_cpu + host.memory_free_mib * by_memory + host.disk_free_gib * by_disk + host.busy * by_io
        )

    def bonus(self, group: GroupHosts | None) -> dict[str, float]:
        """Host → what it gains (or loses) for the members of a soft group that it has."""
        if group is None or not group.members or not group.policy.startswith("soft-"):
            return {}
        sign = 1.0 if group.policy == "soft-affinity" else -1.0
        share = sign * self._settings.affinity_weight / max(group.members.values())
        return {host: share * members for host, members in group.members.items()}

    def best(
        self, count: int, admit: Callable[[HostView], bool], bonus: dict[str, float]
    ) -> list[str]:
        """The best `count` hosts that `admit` lets through; it is asked of each host at most once, best first."""
        found = [(-self.worth(host) - bonus[host.name], host.name) for host in self._among(bonus) if admit(host)]
        plain = 0
        for rank in self._order:
            if plain == count:
                break
            if rank[1] not in bonus and admit(self._hosts[rank[1]]):
                found.append(rank)
                plain += 1
        return [name for _, name in sorted(found)[:count]]

    def __iter__(self) -> Iterator[HostView]:
        return (self._hosts[name] for _, name in self._order)

    def _among(self, names: dict[str, float]) -> list[HostView]:
        return [self._hosts[name] for name in names if name in self._hosts]

    def _rescale(self) -> None:
        """A host larger than all before changes what a share is, and so every place."""
        capacities = [host.capacity for host in self._hosts.values()]
        self._largest = Capacity(
            max(capacity.vcpus for capacity in capacities),
            max(capacity.memory_mib for capacity in capacities),
            max(capacity.disk_gib for capacity in capacities),
        )
        self._set_weights(self._largest)
        self._order = sorted((-self.worth(host), host.name) for host in self._hosts.values())
        for rank in self._order:
            self._hosts[rank[1]].rank = rank

    def _set_weights(self, largest: Capacity) -> None:
        settings = self._settings
        self._weights = (
            settings.cpu_weight / max(1, largest.vcpus),
            settings.memory_weight / max(1, largest.memory_mib),
            settings.disk_weight / max(1, largest.disk_gib),
            settings.io_weight / self._operations_max,
        )
