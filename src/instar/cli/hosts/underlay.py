"""The network that joins the hosts of this machine: a bridge, a veth to each host, and NAT to the outside.

    bridge ul-TAG       in the machine's own network namespace, .1 of the subnet, the hosts' default gateway
    ulTAGn - underlay   the veth of host number n, .(n + 1) of the subnet

Called by `LocalHosts` alone. Every method may be called again and repairs what somebody has damaged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import structlog

from instar.errors import StartupError
from instar.hypervisor.linux_network.host_commands import ip_batch, nft_load, run
from instar.hypervisor.linux_network.links import has_default_route, host_routes
from instar.hypervisor.linux_network.names import ANY_UPLINK, CloudNames
from instar.hypervisor.linux_network.plumbing import IP_FORWARD, SYS_NET

log = structlog.get_logger()

# Addresses for use inside a carrier's network (RFC 6598): neither machines nor guests' networks usually have them.
RANGE = IPv4Network("100.64.0.0/10")
PREFIX = 24
HOSTS_MAX = 64
VETH_GONE_MAX_S, VETH_POLL_S = 2.0, 0.01
INNER = "underlay"  # the interface in the host


class Underlay:
    """`record` is the file that keeps the subnet, so that hosts keep their addresses."""

    def __init__(self, cloud_id: str, record: Path) -> None:
        tag = CloudNames(cloud_id).tag
        self.bridge = f"ul-{tag}"
        self._veths = f"ul{tag}"
        self._table = f"instar_ul_{tag}"
        self._seed = cloud_id
        self._record = record
        self._subnet: IPv4Network | None = None

    def address(self, number: int) -> str:
        """Of host `number`, from 1."""
        return str(self._at(number + 1))

    @property
    def machine_address(self) -> str:
        """By which hosts reach this machine. `ensure` comes first."""
        return self.address(0)

    def _mac(self, number: int) -> str:
        """The same at each start, as a machine's: others remember it."""
        digest = hashlib.sha256(self._seed.encode()).digest()
        return ":".join(f"{octet:02x}" for octet in (0x02, 0x1B, *digest[4:7], number))

    async def ensure(self) -> None:
        """The bridge stands, with its addresses and NAT. Raises StartupError, HypervisorError."""
        standing = (SYS_NET / self.bridge).exists()
        self._subnet = await self._choose(standing)
        new = f"link add {self.bridge} address {self._mac(0)} type bridge forward_delay 0 mcast_snooping 0"
        lines = [] if standing else [new]
        lines += [f"addr replace {self._at(1)}/{PREFIX} dev {self.bridge}", f"link set {self.bridge} up"]
        await ip_batch(lines)
        await nft_load(_machine_rules(self._table, self.bridge, self._subnet))
        if await asyncio.to_thread(IP_FORWARD.read_text) == "0\n" and await has_default_route():
            log.warning("underlay.ip_forward_enabled", why="hosts reach the outside through this machine")
            await asyncio.to_thread(IP_FORWARD.write_text, "1\n")

    async def connect(self, number: int, process: int) -> None:
        """The host whose namespaces `process` is in has its address and its way out. Raises HypervisorError."""
        veth, inside = f"{self._veths}{number}", ["nsenter", "--target", str(process), "--net"]
        links = json.loads(await run(*inside, "ip", "-j", "link", "show"))
        lines = []
        if not any(link["ifname"] == INNER for link in links):
            await _ensure_gone([veth])  # of an earlier life of the host
            lines.append(f"link add {veth} type veth peer name {INNER} address {self._mac(number)} netns {process}")
        lines.append(f"link set {veth} master {self.bridge} up")
        await ip_batch(lines)
        configure = [
            f"addr replace {self.address(number)}/{PREFIX} dev {INNER}",
            f"link set {INNER} up",
            f"route replace default via {self._at(1)} dev {INNER}",
        ]
        await run(*inside, "ip", "-batch", "-", stdin="\n".join(configure) + "\n")
        await run(*inside, "nft", "-f", "-", stdin=_host_rules(self._net))

    async def remove(self) -> None:
        """Nothing of the underlay is left on the machine. The hosts must be gone. Raises HypervisorError."""
        await _ensure_gone([path.name for path in SYS_NET.iterdir() if path.name.startswith(self._veths)])
        if (SYS_NET / self.bridge).exists():
            await ip_batch([f"link del dev {self.bridge}"])
        await nft_load(f"add table ip {self._table}\ndelete table ip {self._table}\n")

    @property
    def _net(self) -> IPv4Network:
        assert self._subnet is not None, "ensure() comes first"
        return self._subnet

    def _at(self, index: int) -> IPv4Address:
        return self._net.network_address + index

    async def _choose(self, standing: bool) -> IPv4Network:
        """The recorded subnet, unless another one of the machine is in its way; else the first free one."""
        others = [route.destination for route in await host_routes() if route.device != self.bridge]
        recorded = await asyncio.to_thread(self._recorded)
        if recorded is not None and (standing or not any(recorded.overlaps(other) for other in others)):
            return recorded
        count = 1 << (PREFIX - RANGE.prefixlen)
        start = int.from_bytes(hashlib.sha256(self._seed.encode()).digest()[:4], "big") % count
        for step in range(count):
            first = RANGE.network_address + ((start + step) % count << (32 - PREFIX))
            subnet = IPv4Network((int(first), PREFIX))
            if not any(subnet.overlaps(other) for other in others):
                await asyncio.to_thread(self._record.write_text, f"{subnet}\n")
                return subnet
        raise StartupError(f"No /{PREFIX} of {RANGE} is free on this machine for the network between its hosts.")

    def _recorded(self) -> IPv4Network | None:
        try:
            return IPv4Network(self._record.read_text().strip())
        except (FileNotFoundError, ValueError):
            return None


async def _ensure_gone(veths: list[str]) -> None:
    """The kernel removes them with the namespace of their host, which takes it a moment."""
    deadline = time.monotonic() + VETH_GONE_MAX_S
    while left := [veth for veth in veths if (SYS_NET / veth).exists()]:
        if time.monotonic() > deadline:
            await ip_batch([f"link del dev {veth}" for veth in left], force=True)
            return
        await asyncio.sleep(VETH_POLL_S)


def _machine_rules(table: str, bridge: str, subnet: IPv4Network) -> str:
    """The hosts leave under the machine's address; nobody outside gets to them through it."""
    return f"""add table ip {table}
delete table ip {table}
table ip {table} {{
chain forward {{
type filter hook forward priority -10; policy accept;
oifname "{bridge}" iifname != "{bridge}" ct state established,related accept
oifname "{bridge}" iifname != "{bridge}" drop
}}
chain source_nat {{
type nat hook postrouting priority 100; policy accept;
ip saddr {subnet} ip daddr != {subnet} oifname != "{bridge}" masquerade
}}
}}
"""


def _host_rules(subnet: IPv4Network) -> str:
    """What hosts say to each other is no business of guests: they leave by NAT, and never to the underlay."""
    return f"""add table ip instar_underlay
delete table ip instar_underlay
table ip instar_underlay {{
chain forward {{
type filter hook forward priority -20; policy accept;
iifname "{ANY_UPLINK}" ip daddr {subnet} drop
}}
}}
"""
