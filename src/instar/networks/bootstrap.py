"""The network that a new cloud begins with. Called by `LocalNetworks.bootstrap`."""

from __future__ import annotations

import asyncio
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path
from uuid import uuid4

from instar.clock import now_us
from instar.networks.addresses import text
from instar.networks.reach import new_vni
from instar.store.contract import Statement, WriteConflict
from instar.store.network_records import NETWORKS, SUBNETS, NetworkRecord, SubnetRecord
from instar.store.quotas import counting_lock

NETWORK_NAME = "private"
SUBNET_NAME = "private-subnet"
NAMESERVERS_MAX = 3  # as many as a resolver asks


def default_gateway(cidr: IPv4Network) -> str | None:
    """The first address of the subnet; none where there are only one or two."""
    return text(int(cidr.network_address) + 1) if cidr.prefixlen < 31 else None


def default_pools(cidr: IPv4Network, gateway_ip: str | None) -> tuple[tuple[str, str], ...]:
    """Every address that a guest can have, the gateway left out."""
    first, last = int(cidr.network_address), int(cidr.broadcast_address)
    if cidr.prefixlen < 31:
        first, last = first + 1, last - 1
    gateway = int(IPv4Address(gateway_ip)) if gateway_ip else None
    if gateway is None or not first <= gateway <= last:
        return ((text(first), text(last)),)
    runs = [(first, gateway - 1), (gateway + 1, last)]
    return tuple((text(low), text(high)) for low, high in runs if low <= high)


async def host_nameservers(resolv_conf: Path) -> tuple[str, ...]:
    """DNS servers of the host that a guest can reach: not those on the host's own loopback."""
    try:
        lines = (await asyncio.to_thread(resolv_conf.read_text, "utf-8", "replace")).splitlines()
    except OSError:
        return ()
    found = []
    for words in (line.split() for line in lines):
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            address = IPv4Address(words[1])
        except AddressValueError:
            continue
        if not (address.is_loopback or address.is_unspecified):
            found.append(str(address))
    return tuple(dict.fromkeys(found))[:NAMESERVERS_MAX]


def bootstrap_statements(
    cidr: str, mtu: int, project_id: str, nameservers: tuple[str, ...]
) -> tuple[NetworkRecord, list[Statement]]:
    """The network and its subnet, written only where the cloud has none yet (else WriteConflict)."""
    block = IPv4Network(cidr)
    now = now_us()
    network = NetworkRecord(
        id=str(uuid4()), project_id=project_id, name=NETWORK_NAME, description="", shared=True, admin_state_up=True,
        mtu=mtu, port_security=True, nat=True, created_at=now, updated_at=now, vni=new_vni(),
    )  # fmt: skip
    gateway = default_gateway(block)
    subnet = SubnetRecord(
        id=str(uuid4()), network_id=network.id, project_id=project_id, name=SUBNET_NAME, description="",
        cidr=str(block), gateway_ip=gateway, dhcp_enabled=True, dhcp_ip=None, dns_nameservers=nameservers,
        host_routes=(), allocation_pools=default_pools(block, gateway), created_at=now, updated_at=now,
    )  # fmt: skip
    return network, [
        counting_lock("networks:nat"),
        NETWORKS.insert(network, guard="NOT EXISTS (SELECT 1 FROM networks WHERE nat = 1)", error=WriteConflict()),
        SUBNETS.insert(subnet),
    ]
