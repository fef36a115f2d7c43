"""A host network of plain bridges: no DHCP, no filter. Lets the libvirt driver be tested by itself."""

from __future__ import annotations

import asyncio
import json
import subprocess

from instar.model.network import PortDefinition
from tests.patience import PATIENCE_S


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout


class PlainBridgeNetwork:
    """Satisfies contract.HostNetwork. Each bridge is named after its network; `cloud` keeps two hosts apart."""

    def __init__(self, cloud: str, namespace: str = "") -> None:
        """In the network namespace of that name, the caller's own without one."""
        self._cloud = cloud
        self._where = ("-n", namespace) if namespace else ()
        self._ports: dict[str, tuple[PortDefinition, ...]] = {}

    async def open(self) -> None:
        return

    async def close(self) -> None:
        return

    def bridge_name(self, network_id: str) -> str:
        return f"tb{self._cloud[:4]}{network_id[:8]}"

    async def ensure_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        self._ports[instance_id] = ports
        for port in ports:
            name = self.bridge_name(port.network.id)
            if name not in self._links("bridge"):
                await asyncio.to_thread(self._ip, "link", "add", name, "type", "bridge")
            await asyncio.to_thread(self._ip, "link", "set", name, "up")

    async def ensure_no_ports(self, instance_id: str) -> None:
        self._ports.pop(instance_id, None)
        used = {self.bridge_name(port.network.id) for ports in self._ports.values() for port in ports}
        for name in self._ours() - used:
            await asyncio.to_thread(self._ip, "link", "delete", name)

    async def census(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        taps = {port.tap_name for ports in self._ports.values() for port in ports} & self._links("tun")
        networks = {
            port.network.id
            for ports in self._ports.values()
            for port in ports
            if self.bridge_name(port.network.id) in self._ours()
        }
        return tuple(sorted(taps)), tuple(sorted(networks))

    def instances_with_ports(self) -> tuple[str, ...]:
        return tuple(sorted(self._ports))

    async def remove_everything(self) -> None:
        self._ports.clear()
        for name in self._ours():
            await asyncio.to_thread(self._ip, "link", "delete", name)

    def _ours(self) -> set[str]:
        return {name for name in self._links("bridge") if name.startswith(f"tb{self._cloud[:4]}")}

    def _links(self, kind: str) -> set[str]:
        return {link["ifname"] for link in json.loads(self._ip("-json", "link", "show", "type", kind) or "[]") if link}

    def _ip(self, *arguments: str) -> str:
        return ip(*self._where, *arguments)
