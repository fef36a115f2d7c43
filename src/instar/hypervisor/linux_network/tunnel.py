"""The VXLAN device by which a network reaches the other hosts, and the announcement of a guest that is here now.

Frames whose target is not known go to each remote host (a flood list, no multicast); where a guest is, is learned from
its frames. Called by `LinuxNetwork`, never twice at once for one network. See docs/decisions/0009."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

import structlog

from instar.errors import HypervisorError
from instar.hypervisor.linux_network.host_commands import fdb_batch, ip_batch, run
from instar.hypervisor.linux_network.names import CloudNames
from instar.hypervisor.linux_network.plumbing import SYS_NET, attribute, is_up, master_of
from instar.model.network import NetworkDefinition

log = structlog.get_logger(__name__)

VXLAN_PORT = 4789  # RFC 7348
OVERHEAD = 50  # bytes: Ethernet, IPv4, UDP and VXLAN headers
EVERYBODY = "00:00:00:00:00:00"  # the forwarding entry for frames whose target is not known
RARP = 0x8035


async def underlay_mtu(address: str) -> int:
    """The MTU of the interface with this address. Raises HypervisorError when the host has not got it."""
    entries = json.loads(await run("ip", "-j", "-4", "addr", "show", "to", f"{address}/32") or b"[]")
    mtus = [int(entry["mtu"]) for entry in entries if entry.get("addr_info")]
    if not mtus:
        raise HypervisorError(reason=f"no interface of the host has the address {address} for traffic between hosts")
    return min(mtus)


def remotes_of(network: NetworkDefinition, local: str | None) -> tuple[str, ...]:
    """The hosts that the network has a tunnel to from here; none where this host has no address for it."""
    if local is None or network.vni == 0:
        return ()
    return tuple(sorted({remote for remote in network.remotes if remote != local}))


class Tunnel:
    """The tunnel of one network of one cloud on this host. `local` is the host's own address in the underlay."""

    def __init__(self, names: CloudNames, network_id: str, *, local: str | None) -> None:
        self._name, self._bridge = names.tunnel(network_id), names.bridge(network_id)
        self._local = local

    async def ensure(self, network: NetworkDefinition, *, thorough: bool) -> None:
        """It stands and floods to the network's remotes, or is gone where there are none. Without `thorough` only what
        the kernel's files say is looked at, which costs no process."""
        remotes = remotes_of(network, self._local)
        if not remotes:
            if await asyncio.to_thread((SYS_NET / self._name).exists):
                await ip_batch([f"link del dev {self._name}"])
            return
        if not thorough and await asyncio.to_thread(self._stands, network):
            return
        await self._ensure_device(network)
        await self._ensure_flooding(remotes)
        await ip_batch([f"link set {self._name} mtu {network.mtu} master {self._bridge} up"])

    def _stands(self, network: NetworkDefinition) -> bool:
        return (
            is_up(self._name)
            and master_of(self._name) == self._bridge
            and attribute(self._name, "mtu") == str(network.mtu)
        )

    async def _ensure_device(self, network: NetworkDefinition) -> None:
        lines = []
        there = await asyncio.to_thread((SYS_NET / self._name).exists)
        if there and await self._parameters() != (network.vni, self._local, VXLAN_PORT):
            lines.append(f"link del dev {self._name}")
            there = False
        if not there:
            log.info("network.tunnel", network_id=network.id, vni=network.vni, tunnel=self._name)
            parameters = f"id {network.vni} local {self._local} dstport {VXLAN_PORT} learning"
            lines.append(f"link add {self._name} type vxlan {parameters}")
        await ip_batch(lines)
        with contextlib.suppress(OSError):  # a kernel without IPv6
            await asyncio.to_thread(Path(f"/proc/sys/net/ipv6/conf/{self._name}/disable_ipv6").write_text, "1")

    async def _parameters(self) -> tuple[object, object, object]:
        entries = json.loads(await run("ip", "-d", "-j", "link", "show", "dev", self._name) or b"[]")
        facts = entries[0].get("linkinfo", {}).get("info_data", {}) if entries else {}
        return facts.get("id"), facts.get("local"), facts.get("port")

    async def _ensure_flooding(self, remotes: Iterable[str]) -> None:
        """What was learned is forgotten when the remotes change: a guest may have moved to the new one, and what was
        learned of one that left leads nowhere. It is learned again with the next frame."""
        entries = json.loads(await run("bridge", "-j", "fdb", "show", "dev", self._name) or b"[]")
        entries = [entry for entry in entries if "dst" in entry]
        found = {entry["dst"] for entry in entries if entry["mac"] == EVERYBODY}
        wanted = set(remotes)
        if found == wanted:
            return
        lines = [f"fdb append {EVERYBODY} dev {self._name} dst {remote}" for remote in sorted(wanted - found)]
        lines += [f"fdb del {EVERYBODY} dev {self._name} dst {remote}" for remote in sorted(found - wanted)]
        await fdb_batch(lines)
        learned = [entry for entry in entries if entry["mac"] != EVERYBODY]
        await fdb_batch([f"fdb del {entry['mac']} dev {self._name} dst {entry['dst']}" for entry in learned], force=True)

    async def announce(self, macs: Iterable[str]) -> None:
        """Guests with these MACs are on this host: the others send their frames here from now on."""
        if not macs or not await asyncio.to_thread((SYS_NET / self._name).exists):
            return
        # The bridge may still know them behind the tunnel.
        sides = ("self", "master")
        await fdb_batch([f"fdb del {mac} dev {self._name} {side}" for mac in macs for side in sides], force=True)
        try:
            await asyncio.to_thread(self._send_announcements, list(macs))
        except OSError as error:  # the guest's own first frame does the same, only later
            log.warning("network.not_announced", tunnel=self._name, error=str(error))

    def _send_announcements(self, macs: list[str]) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((self._name, 0))
            for mac in macs:
                sender.send(announcement(mac))


def announcement(mac: str) -> bytes:
    """A RARP request (RFC 903) as a hypervisor sends it for a guest that arrived: nobody answers it."""
    address = bytes.fromhex(mac.replace(":", ""))
    sender_and_target = (address + bytes(4)) * 2
    return b"\xff" * 6 + address + struct.pack("!HHHBBH", RARP, 1, 0x0800, 6, 4, 3) + sender_and_target
