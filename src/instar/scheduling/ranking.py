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

BLOCK_FIRST = 16  # hosts that filters are asked of at first, and how much more the next time
BLOCK_GROWTH = 16

_Rank = tuple[float, str, HostView]  # minus its worth, its name, itself; names differ, so hosts are never compared


class Ranking:
    """Hosts, best first; equal ones by name. `operations_max`: operations that one host works on at once."""

    def __init__(self, settings: SchedulingSettings, operations_max: int) -> None:
        self._settings = settings
        self._operations_max = operations_max
        self._order: list[_Rank] = []
        self._ranks: dict[str, _Rank] = {}  # each host's entry in the order
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
        rank = (-self.worth(host), host.name, host)
        if rank == self._ranks.get(host.name):
            return
        self._leave(host.name)
        self._hosts[host.name] = host
        self._ranks[host.name] = rank
        insort(self._order, rank)

    def remove(self, host: HostView) -> None:
        self._leave(host.name)
        self._hosts.pop(host.name, None)

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

    def best(self, count: int, sift: Callable[[list[HostView]], list[HostView]], bonus: dict[str, float]) -> list[str]:
        """The best `count` hosts that `sift` lets through. It is asked of blocks of hosts, best first, that grow: most
        requests find their hosts in the first, and those that do not soon get through all."""
        moved = [self._hosts[name] for name in bonus if name in self._hosts]
        found = [(-self.worth(host) - bonus[host.name], host.name) for host in sift(moved)] if moved else []
        plain, start, length = 0, 0, max(BLOCK_FIRST, count)
        while plain < count and start < len(self._order):
            block = [rank[2] for rank in self._order[start : start + length]]
            if bonus:
                block = [host for host in block if host.name not in bonus]
            start, length = start + length, length * BLOCK_GROWTH
            for host in sift(block)[: count - plain]:
                found.append(self._ranks[host.name][:2])
                plain += 1
        return [name for _, name in sorted(found)[:count]]

    def __iter__(self) -> Iterator[HostView]:
        return (host for _, _, host in self._order)

    def _rescale(self) -> None:
        """A host larger than all before changes what a share is, and so every place."""
        capacities = [host.capacity for host in self._hosts.values()]
        self._largest = Capacity(
            max(capacity.vcpus for capacity in capacities),
            max(capacity.memory_mib for capacity in capacities),
            max(capacity.disk_gib for capacity in capacities),
        )
        self._set_weights(self._largest)
        self._order = sorted((-self.worth(host), host.name, host) for host in self._hosts.values())
        self._ranks = {rank[1]: rank for rank in self._order}

    def _leave(self, name: str) -> None:
        rank = self._ranks.pop(name, None)
        if rank is not None:
            del self._order[bisect_left(self._order, rank)]

    def _set_weights(self, largest: Capacity) -> None:
        settings = self._settings
        self._weights = (
            settings.cpu_weight / max(1, largest.vcpus),
            settings.memory_weight / max(1, largest.memory_mib),
            settings.disk_weight / max(1, largest.disk_gib),
            settings.io_weight / self._operations_max,
        )
