"""What a subnet may be: its range, pools, gateway, and the address of its DHCP server. Nothing here asks anybody."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv4Network, ip_network
from itertools import pairwise

from msgspec import UNSET, UnsetType

from instar.networks.addresses import free_runs, number, text
from instar.networks.addressing import usable
from instar.networks.bootstrap import default_gateway, default_pools
from instar.networks.failures import GatewayConflictWithAllocationPools, InvalidInput
from instar.networks.schemas import HostRoute, Pool

Pools = tuple[tuple[str, str], ...]
PREFIX_MIN = 8
PREFIX_DHCP_MAX = 30


def read_address(value: str, path: str) -> str:
    """A dotted quad, unchanged. Raises InvalidInput that names `path`, a JSON path."""
    try:
        return str(IPv4Address(value))
    except AddressValueError as error:
        raise InvalidInput(reason=f"{value[:64]!r} is not a valid IPv4 address", path=path) from error


def read_cidr(value: str | None, path: str) -> IPv4Network:
    """The range of a subnet: written as CIDR, with no bit set behind the prefix, and fit for guests."""
    if value is None:
        raise InvalidInput(reason="a subnet needs a cidr, this cloud has no subnet pools", path=path)
    try:
        cidr = ip_network(value)
    except ValueError as error:
        raise InvalidInput(reason=f"{value[:64]!r} is not a valid IPv4 CIDR, such as 10.1.0.0/24", path=path) from error
    if not isinstance(cidr, IPv4Network):
        raise InvalidInput(reason=f"{value[:64]!r} is IPv6, this cloud serves IPv4", path=path)
    if cidr.prefixlen < PREFIX_MIN or cidr.is_multicast or cidr.is_loopback or cidr.is_link_local or cidr.is_unspecified:
        raise InvalidInput(reason=f"{value} cannot be the range of a subnet", path=path)
    return cidr


def read_gateway(given: str | UnsetType | None, cidr: IPv4Network) -> str | None:
    """The first address when none is given; None when the subnet shall have none."""
    if given is UNSET:
        return default_gateway(cidr)
    if given is None:
        return None
    gateway = read_address(given, "$.subnet.gateway_ip")
    if not usable(str(cidr), number(gateway)):
        raise InvalidInput(reason=f"the gateway {gateway} is not a host's address in {cidr}", path="$.subnet.gateway_ip")
    return gateway


def read_pools(given: Sequence[Pool] | None, cidr: IPv4Network, gateway_ip: str | None) -> Pools:
    """Everything but the gateway when none are given. Raises InvalidInput, GatewayConflictWithAllocationPools."""
    if given is None:
        return default_pools(cidr, gateway_ip)
    pools = []
    for index, pool in enumerate(given):
        path = f"$.subnet.allocation_pools[{index}]"
        first, last = read_address(pool.start, f"{path}.start"), read_address(pool.end, f"{path}.end")
        if number(first) > number(last):
            raise InvalidInput(reason=f"the pool {first}-{last} ends before it starts", path=path)
        if not (usable(str(cidr), number(first)) and usable(str(cidr), number(last))):
            raise InvalidInput(reason=f"the pool {first}-{last} is not within the hosts' addresses of {cidr}", path=path)
        pools.append((first, last))
    pools.sort(key=lambda one: number(one[0]))
    for (_, last), (first, _) in pairwise(pools):
        if number(first) <= number(last):
            raise InvalidInput(reason="two allocation pools overlap", path="$.subnet.allocation_pools")
    check_gateway(pools, gateway_ip)
    return tuple(pools)


def check_gateway(pools: Iterable[tuple[str, str]], gateway_ip: str | None) -> None:
    """The gateway is never handed out."""
    for first, last in pools if gateway_ip is not None else ():
        assert gateway_ip is not None
        if number(first) <= number(gateway_ip) <= number(last):
            raise GatewayConflictWithAllocationPools(ip_address=gateway_ip, pool=f"{first}-{last}")


def read_routes(given: Sequence[HostRoute] | None) -> tuple[tuple[str, str], ...]:
    routes = []
    for index, route in enumerate(given or ()):
        path = f"$.subnet.host_routes[{index}]"
        try:
            destination = ip_network(route.destination)
        except ValueError:
            destination = None
        if not isinstance(destination, IPv4Network):
            raise InvalidInput(reason=f"{route.destination!r} is not a valid IPv4 CIDR", path=f"{path}.destination")
        routes.append((str(destination), read_address(route.nexthop, f"{path}.nexthop")))
    return tuple(dict.fromkeys(routes))


def read_nameservers(given: Sequence[str] | None) -> tuple[str, ...]:
    read = [read_address(one, f"$.subnet.dns_nameservers[{index}]") for index, one in enumerate(given or ())]
    return tuple(dict.fromkeys(read))


def dhcp_address(
    cidr: IPv4Network, gateway_ip: str | None, pools: Pools, *, nat: bool, enabled: bool, used: Iterable[str],
    now: str | None,
) -> str | None:  # fmt: skip
    """The address that the DHCP server of a subnet has for itself; None where it answers from the gateway's.

    On a network with NAT the host is the gateway. On others the gateway's address is left for a guest, and the server
    has one of its own, `now` if it can stay. Raises InvalidInput when there is none left."""
    if nat and gateway_ip is not None:
        return None
    if enabled and cidr.prefixlen > PREFIX_DHCP_MAX:
        raise InvalidInput(reason=f"{cidr} is too small for a DHCP server", path="$.subnet.enable_dhcp")
    taken = {number(address) for address in used}
    if gateway_ip is not None:
        taken.add(number(gateway_ip))
    if now is not None and number(now) not in taken:
        return now
    for ranges in (pools, default_pools(cidr, gateway_ip)):
        for first, _ in free_runs(ranges, taken):
            return text(first)
    if enabled:
        raise InvalidInput(reason=f"{cidr} has no address left for the DHCP server", path="$.subnet.enable_dhcp")
    return None
