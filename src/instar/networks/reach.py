"""Where networks reach: the tunnels' numbers, and the addresses of the hosts that a network's ports are on.

Called by `LocalNetworks`, whose definitions tell each host of the others."""

from __future__ import annotations

import ipaddress
import secrets
import time
from collections.abc import Collection, Mapping

from msgspec.structs import replace

from instar.model.network import NetworkDefinition
from instar.store.contract import Store
from instar.store.network_reach import host_addresses, network_hosts

VNI_MAX = (1 << 24) - 1
ADDRESSES_FRESH_S = 10.0
CACHED_MAX = 4096


def new_vni() -> int:
    """A tunnel's number, drawn from all: clouds that share an underlay without knowing rarely draw the same."""
    return secrets.randbelow(VNI_MAX) + 1


class Reach:
    """The hosts of networks by the networks' `reach`: whoever asks has just read it, so an old entry is never used."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._addresses: dict[str, str] = {}  # of hosts that others can reach
        self._known_hosts: frozenset[str] = frozenset()
        self._read_at = float("-inf")
        self._hosts: dict[str, tuple[int, frozenset[str]]] = {}

    async def addresses(self, hosts: Collection[str]) -> dict[str, str]:
        """Host → IPv4 address, for those of these hosts that have one that others can reach."""
        if time.monotonic() - self._read_at > ADDRESSES_FRESH_S or not self._known_hosts.issuperset(hosts):
            found = await host_addresses(self._store)
            self._known_hosts = frozenset(found) | frozenset(hosts)
            self._addresses = {host: address for host, address in found.items() if _is_reachable(address)}
            self._read_at = time.monotonic()
        return {host: self._addresses[host] for host in hosts if host in self._addresses}

    async def over_hosts(self) -> bool:
        """Whether there are two hosts that can reach each other: else nobody must be told of others.

        Asked when a host got or lost a network, which is rare. A no is asked again: the second host may be known to
        another process only."""
        if len(self._addresses) < 2:
            self._read_at = float("-inf")
        await self.addresses(())
        return len(self._addresses) > 1

    async def members(self, reaches: Mapping[str, int], hosts: Collection[str]) -> dict[str, dict[str, str]]:
        """Network → host → address, for networks at this `reach` or later. `hosts`: for whom it is.

        A network's hosts are read once for each of its reaches; a host among them that is not known yet is looked for."""
        await self.addresses(hosts)
        if len(self._hosts) > CACHED_MAX:
            self._hosts.clear()
        members = {}
        for network_id, reach in reaches.items():
            known = self._hosts.get(network_id)
            if known is None or known[0] < reach:
                known = self._hosts[network_id] = reach, await network_hosts(self._store, network_id)
            members[network_id] = await self.addresses(known[1])
        return members


def reaching(definition: NetworkDefinition, reach: int, members: Mapping[str, str], host: str) -> NetworkDefinition:
    """The network as `host` gets it: with the addresses of the others."""
    own = members.get(host)
    others = {address for name, address in members.items() if name != host and address != own} if own else set()
    return replace(definition, reach=reach, remotes=tuple(sorted(others)))


def _is_reachable(address: str) -> bool:
    try:
        parsed = ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return not (parsed.is_loopback or parsed.is_unspecified)
