"""The addresses of the link between the host and a network's namespace, and the host's routes to the subnets.

A link is a /30 of 169.254.64.0/18, chosen by the network's id and checked against all routes of the host. Two clouds that
choose at the same moment take turns by a name that only one process of the host can bind."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Iterable

import msgspec

from instar.errors import HypervisorError
from instar.hypervisor.linux_network import netlink
from instar.hypervisor.linux_network.host_commands import run

LINK_RANGE = ipaddress.IPv4Network("169.254.64.0/18")
LINKS_MAX = LINK_RANGE.num_addresses // 4
ZONE_BASE = 0x4000  # conntrack zones have 16 bits; low numbers are what others choose first
TURN_MAX_S = 30.0
_TURN_NAME = "\0instar-network-links"


class Link(msgspec.Struct, frozen=True):
    """The link number `index` of this host."""

    index: int

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network((int(LINK_RANGE.network_address) + 4 * self.index, 30))

    @property
    def host_address(self) -> ipaddress.IPv4Address:
        return self.network.network_address + 1

    @property
    def inner_address(self) -> ipaddress.IPv4Address:
        """The end in the namespace; what the guests' packets are translated to."""
        return self.network.network_address + 2

    @property
    def zone(self) -> int:
        return ZONE_BASE + self.index


class HostRoute(msgspec.Struct, frozen=True):
    destination: ipaddress.IPv4Network
    device: str


async def host_routes() -> list[HostRoute]:
    """The host's IPv4 routes in all tables, default routes and the halves of the address space (VPNs) left out."""
    try:
        found = await asyncio.to_thread(netlink.routes)
    except OSError as error:
        raise HypervisorError(reason="the host does not tell its routes") from error
    return [HostRoute(destination, device) for destination, device in found if destination.prefixlen > 1]


async def has_default_route() -> bool:
    return len(json.loads(await run("ip", "-4", "-j", "route", "show", "default") or b"[]")) > 0


def overlapping(subnet: ipaddress.IPv4Network, routes: Iterable[HostRoute], *, but_for: str) -> HostRoute | None:
    """A route of the host, not of device `but_for`, that has an address in common with the subnet."""
    return next((r for r in routes if r.device != but_for and r.destination.overlaps(subnet)), None)


def choose_link(seed: int, routes: Iterable[HostRoute], taken: Iterable[int]) -> Link:
    """The first free link from `seed` on. Raises HypervisorError when the host has none left."""
    used = set(taken)
    near = [route.destination for route in routes if route.destination.overlaps(LINK_RANGE)]
    # A route for the whole of 169.254.0.0/16 (zeroconf) is no clash: ours are longer.
    near = [destination for destination in near if destination.prefixlen > LINK_RANGE.prefixlen]
    for step in range(LINKS_MAX):
        link = Link((seed + step) % LINKS_MAX)
        if link.index not in used and not any(destination.overlaps(link.network) for destination in near):
            return link
    raise HypervisorError(reason="the host has no free link addresses left")


@contextlib.asynccontextmanager
async def turn_to_choose() -> AsyncIterator[None]:
    """One process of this host at a time, released by the kernel if it dies. Raises HypervisorError after 30 seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as turn:
        async with asyncio.timeout(TURN_MAX_S) as deadline:
            while True:
                try:
                    turn.bind(_TURN_NAME)
                    break
                except OSError:
                    if (deadline.when() or 0) - asyncio.get_running_loop().time() < 0.05:
                        raise HypervisorError(reason="another cloud on the host holds its link addresses") from None
                    await asyncio.sleep(0.01)
        yield
