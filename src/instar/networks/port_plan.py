"""What a port may be: its MAC, addresses, groups and pairs. Called by the handlers of ports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_network

from instar.errors import BadRequest
from instar.model.network import FixedIp
from instar.networks.addressing import Addressing, Held, conflict, fixed_ip, kept_by_cloud, subnet_of
from instar.networks.definitions import Topology
from instar.networks.failures import (
    AddressPairAndPortSecurityRequired,
    InvalidInput,
    IpAddressGenerationFailure,
    IpAddressInUse,
    PortSecurityPortHasSecurityGroup,
)
from instar.networks.schemas import Pair, WantedIp
from instar.store.contract import Statement
from instar.store.network_records import PortRecord
from instar.store.networks import address_take

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def read_mac(value: str, path: str) -> str:
    """In lower case. Raises InvalidInput for what is no address of one NIC."""
    mac = value.lower().replace("-", ":")
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidInput(reason=f"{value[:32]!r} is not a valid MAC address of one NIC", path=path)
    return mac


def read_pairs(given: Sequence[Pair] | None, mac_address: str) -> tuple[tuple[str, str], ...]:
    """Allowed address pairs; one without a MAC is for that of the port."""
    pairs = []
    for index, pair in enumerate(given or ()):
        path = f"$.port.allowed_address_pairs[{index}]"
        try:
            network = ip_network(pair.ip_address, strict=False)
        except ValueError as error:
            reason = f"{pair.ip_address[:64]!r} is not a valid IP address or CIDR"
            raise InvalidInput(reason=reason, path=f"{path}.ip_address") from error
        address = str(network) if "/" in pair.ip_address else str(network.network_address)
        mac = mac_address if pair.mac_address is None else read_mac(pair.mac_address, f"{path}.mac_address")
        if (address, mac) in pairs:
            raise InvalidInput(reason="the address pair is given twice", path=path)
        pairs.append((address, mac))
    return tuple(pairs)


def check_security(port: PortRecord) -> None:
    """Groups and pairs need port security. Raises Conflict."""
    if port.port_security:
        return
    if port.security_groups:
        raise PortSecurityPortHasSecurityGroup()
    if port.allowed_pairs:
        raise AddressPairAndPortSecurityRequired()


async def choose_addresses(
    wanted: Sequence[WantedIp] | None, topology: Topology, now: Sequence[FixedIp], addressing: Addressing, held: Held
) -> list[FixedIp]:
    """Addresses for what a user asked: None means one, where the network has subnets. What the port has `now` and fits
    is kept. Raises IpAddressGenerationFailure, IpAddressInUse, InvalidInput."""
    if wanted is None:
        if not topology.subnets:
            return []
        chosen = await addressing.choose(topology, held)
        if chosen is None:
            raise IpAddressGenerationFailure(network_id=topology.network.id)
        return [chosen]
    left = list(now)
    explicit = {one.ip_address for one in wanted if one.ip_address}
    addresses = []
    for index, one in enumerate(wanted):
        path = f"$.port.fixed_ips[{index}]"
        if one.ip_address is not None:
            found = _explicit(one, topology, left, path)
        elif one.subnet_id is not None:
            found = next(
                (had for had in left if had.subnet_id == one.subnet_id and had.ip_address not in explicit), None
            ) or await _of_subnet(one.subnet_id, topology, addressing, held, path)
        else:
            raise InvalidInput(reason="a fixed IP needs a subnet_id or an ip_address", path=path)
        if found in left:
            left.remove(found)
        addresses.append(found)
    return addresses


def _explicit(one: WantedIp, topology: Topology, had: Sequence[FixedIp], path: str) -> FixedIp:
    assert one.ip_address is not None
    subnet = subnet_of(topology, one.ip_address)
    if subnet is None or one.subnet_id not in (None, subnet.id):
        where = f"subnet {one.subnet_id}" if one.subnet_id else f"network {topology.network.id}"
        raise InvalidInput(reason=f"IP address {one.ip_address} is not a valid IP for {where}", path=f"{path}.ip_address")
    found = fixed_ip(subnet, one.ip_address)
    if found not in had and kept_by_cloud(topology, subnet, one.ip_address):
        raise IpAddressInUse(ip_address=one.ip_address, network_id=topology.network.id)
    return found


async def _of_subnet(subnet_id: str, topology: Topology, addressing: Addressing, held: Held, path: str) -> FixedIp:
    subnet = next((one for one in topology.subnets if one.id == subnet_id), None)
    if subnet is None:
        reason = f"subnet {subnet_id} is not of network {topology.network.id}"
        raise InvalidInput(reason=reason, path=f"{path}.subnet_id")
    found = await addressing.choose_in(subnet, held)
    if found is None:
        raise IpAddressGenerationFailure(network_id=topology.network.id)
    return found


def take(
    addresses: Sequence[FixedIp], port_id: str, wanted: Sequence[WantedIp] | None, network_id: str
) -> list[Statement]:
    """The addresses are the port's. One that the user named and somebody else has is an error; one that was chosen here
    and is gone means to choose again."""
    named = {one.ip_address for one in wanted or ()}
    return [
        address_take(
            one.subnet_id, one.ip_address, port_id,
            taken=IpAddressInUse(ip_address=one.ip_address, network_id=network_id)
            if one.ip_address in named
            else conflict(one.subnet_id),
        )
        for one in addresses
    ]  # fmt: skip


def check_binding(vnic_type: str | None, profile: object) -> None:
    """Raises BadRequest for a kind of NIC that hosts cannot make."""
    if vnic_type not in (None, "", "normal"):
        raise BadRequest("Invalid input: this cloud serves normal NICs - at `$.port.binding:vnic_type`.")
    if profile:
        raise BadRequest("Invalid input: this cloud has no binding profiles - at `$.port.binding:profile`.")
