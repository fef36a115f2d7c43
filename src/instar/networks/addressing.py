"""Which address a new port gets. Used by `allocate` and by the Network API; the database has the last word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from instar.model.network import FixedIp
from instar.networks.addresses import FreeAddresses, free_runs, number, text
from instar.networks.definitions import Topology
from instar.networks.failures import ChangedMeanwhile
from instar.store.contract import Store
from instar.store.network_records import SubnetRecord
from instar.store.networks import addresses_used

SUBNETS_REMEMBERED_MAX = 4096


class AddressTaken(ChangedMeanwhile):
    """Somebody else got the address: choose another. `subnet_id` says where."""


class Held:
    """Addresses that one caller has chosen and not yet written; nobody else in this process is offered them."""

    def __init__(self) -> None:
        self.addresses: list[tuple[str, int]] = []


class Addressing:
    """Chooses free addresses with no read at all, until a choice turns out to be wrong or all are used up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._free: dict[str, tuple[int, FreeAddresses]] = {}  # by subnet, with the subnet's revision
        self._held: dict[str, set[int]] = {}

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Around choosing and writing. An address that turns out to be taken makes the next choice look again."""
        held = Held()
        try:
            yield held
        except AddressTaken as error:
            self._free.pop(error.subnet_id, None)
            raise
        finally:
            for subnet_id, address in held.addresses:
                mine = self._held[subnet_id]
                mine.discard(address)
                if not mine:
                    del self._held[subnet_id]

    async def choose(self, topology: Topology, held: Held) -> FixedIp | None:
        """An address of the first subnet that has a free one; None when the network is full."""
        for subnet in topology.subnets:
            chosen = await self.choose_in(subnet, held)
            if chosen is not None:
                return chosen
        return None

    async def choose_in(self, subnet: SubnetRecord, held: Held) -> FixedIp | None:
        """A free address of this subnet's pools; None when there is none."""
        chosen = self._next(subnet)
        if chosen is None:
            used = [number(address) for address in await addresses_used(self._store, subnet.id)]
            if subnet.dhcp_enabled and subnet.dhcp_ip is not None:
                used.append(number(subnet.dhcp_ip))
            if len(self._free) >= SUBNETS_REMEMBERED_MAX:
                self._free.clear()
            self._free[subnet.id] = (subnet.revision, FreeAddresses(free_runs(subnet.allocation_pools, used)))
            chosen = self._next(subnet)
        if chosen is None:
            return None
        held.addresses.append((subnet.id, chosen))
        self._held.setdefault(subnet.id, set()).add(chosen)
        return fixed_ip(subnet, text(chosen))

    def _next(self, subnet: SubnetRecord) -> int | None:
        revision, free = self._free.get(subnet.id, (-1, None))
        if free is None or revision != subnet.revision:
            return None
        return free.take(self._held.get(subnet.id, ()))


def fixed_ip(subnet: SubnetRecord, ip_address: str) -> FixedIp:
    return FixedIp(subnet_id=subnet.id, ip_address=ip_address, prefix_length=int(subnet.cidr.rpartition("/")[2]))


def subnet_of(topology: Topology, ip_address: str) -> SubnetRecord | None:
    """The subnet in which a guest can have this address; None where there is none, or it is no IPv4 address."""
    try:
        value = number(ip_address)
    except OSError:
        return None
    if text(value) != ip_address:
        return None
    for subnet in topology.subnets:
        if usable(subnet.cidr, value):
            return subnet
    return None


def kept_by_cloud(topology: Topology, subnet: SubnetRecord, ip_address: str) -> bool:
    """Whether the cloud itself has this address: its DHCP server, or its router on a network with NAT."""
    if ip_address == subnet.dhcp_ip:
        return subnet.dhcp_enabled
    return ip_address == subnet.gateway_ip and (topology.network.nat or subnet.dhcp_ip is None)


def usable(cidr: str, value: int) -> bool:
    """Inside the subnet, and neither its network nor its broadcast address."""
    base, _, length = cidr.partition("/")
    first = number(base)
    size = 1 << (32 - int(length))
    if size <= 2:  # /31 and /32 have neither
        return first <= value < first + size
    return first < value < first + size - 1


def conflict(subnet_id: str) -> AddressTaken:
    return AddressTaken(subnet_id=subnet_id)
