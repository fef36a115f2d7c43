"""The libvirt driver under the contract suite: damage is done by a second, plain libvirt connection and by signals."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from pathlib import Path
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree as ET

import libvirt
import msgspec

from instar.errors import HypervisorUnavailable
from instar.hypervisor.libvirt.driver import LibvirtHypervisor
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.stream_peers import StreamFetches, StreamGrants
from instar.model.guest import GuestEvent, ImageSource
from instar.model.network import NetworkDefinition, SubnetDefinition
from instar.model.volume import VolumeConnection
from tests.patience import patience

from .plain_bridge import PlainBridgeNetwork, ip
from .tiny_guest import boots_line, write_image
from .volume_exports import VolumeExports

BOOT_TIMEOUT_S = 300.0  # of a machine that does much else; 10 s where it does not


class LibvirtHarness:
    """See harness.Harness. `hypervisor` is replaced by `reopen`."""

    def __init__(
        self, daemon: PrivateDaemon, directory: Path, settings: LibvirtSettings, *, name: str = "host-1",
        namespace: str = "", streams: StreamGrants | None = None, fetches: StreamFetches | None = None,
    ) -> None:  # fmt: skip
        self.daemon, self.directory, self.settings, self.name = daemon, directory, settings, name
        self._streams, self._fetches = streams, fetches
        self.paths = HostPaths(directory / "state")
        self.events: list[GuestEvent] = []
        self._bridges = PlainBridgeNetwork(self.paths.cloud_id, namespace)
        self._network = NetworkDefinition(
            id=str(uuid4()), mtu=1400, subnets=(SubnetDefinition(str(uuid4()), "10.213.77.0/24", "10.213.77.1"),)
        )
        self._volumes = VolumeExports(directory / "volumes")
        self.hypervisor = self._driver()

    @classmethod
    async def opened(
        cls, daemon: PrivateDaemon, directory: Path, settings: LibvirtSettings | None = None
    ) -> LibvirtHarness:
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
        harness = cls(daemon, directory, settings or LibvirtSettings(unplug_timeout_s=1.5 * patience()))
        await harness.hypervisor.open(harness.events.append)
        return harness

    def _driver(self) -> LibvirtHypervisor:
        return LibvirtHypervisor(
            uri=self.daemon.uri,
            host=self.name,
            state_dir=self.paths.state_dir,
            network=self._bridges,
            settings=self.settings,
            streams=self._streams,
            fetches=self._fetches,
        )

    def image(self, *, heeds_power_button: bool = True) -> ImageSource:
        name = "tiny" if heeds_power_button else "deaf"
        path = self.directory / f"{name}.raw"
        if path.exists():  # it may be linked into the cache and read only by now
            path.unlink()
        return write_image(path, heeds_power_button=heeds_power_button)

    def broken_image(self) -> ImageSource:
        return msgspec.structs.replace(self.image(), sha256="0" * 64)

    def network(self) -> NetworkDefinition:
        return self._network

    def bridge(self, network: NetworkDefinition) -> str:
        return self._bridges.bridge_name(network.id)

    async def volume(self, *, size_bytes: int = 1 << 20, over_tcp: bool = False) -> VolumeConnection:
        return await asyncio.to_thread(self._volumes.serve, size_bytes, over_tcp=over_tcp)

    async def volume_dies(self, connection: VolumeConnection) -> None:
        await asyncio.to_thread(self._volumes.kill, connection)

    async def volume_lives(self, connection: VolumeConnection) -> None:
        await asyncio.to_thread(self._volumes.revive, connection)

    async def reset_guest(self, instance_id: str) -> None:
        """Its processor begins anew, with whatever it boots from."""
        await self._with_domain(instance_id, lambda domain: domain.reset())

    async def is_held_still(self, instance_id: str) -> bool:
        """By QEMU."""
        paused = libvirt.VIR_DOMAIN_PAUSED
        return bool(await self._with_domain(instance_id, lambda domain: domain.state()[0] == paused))

    async def volume_afar(self) -> VolumeConnection:
        """A volume of another machine: its socket is not to be seen from this host."""
        return await asyncio.to_thread(self._volumes.afar, await self.volume())

    def relays(self) -> list[int]:
        """Processes by which guests of this host reach volumes of other machines."""
        found = [int(path.read_text()) for path in (self.paths.runtime / "volumes").glob("*.pid")]
        return [pid for pid in found if Path(f"/proc/{pid}").exists()]

    def volume_file(self, connection: VolumeConnection) -> Path:
        """Where the data of a volume that `volume` made is: raw."""
        return self._volumes.directory / connection.export

    async def wait_until_booted(self, instance_id: str, *, boots: int) -> None:
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            while True:
                if boots_line(boots) in await self.hypervisor.console_output(instance_id, length_bytes=10_000):
                    return
                await asyncio.sleep(0.02)

    async def _with_domain(self, instance_id: str, act: Any) -> Any:
        def run() -> Any:
            connection = libvirt.open(self.daemon.uri)
            try:
                return act(connection.lookupByUUIDString(instance_id))
            finally:
                connection.close()

        return await asyncio.to_thread(run)

    async def kill_guest(self, instance_id: str) -> None:
        await asyncio.to_thread(_kill_emulator, instance_id)

    async def pause_guest(self, instance_id: str) -> None:
        await self._with_domain(instance_id, lambda domain: domain.suspend())

    async def lose_domain(self, instance_id: str) -> None:
        def lose(domain: Any) -> None:
            domain.destroy()
            domain.undefine()

        await self._with_domain(instance_id, lose)

    async def detach_nics(self, instance_id: str) -> None:
        """As if the guest had not been asked: the taps are deleted, and the definition loses its devices."""

        def detach(domain: Any) -> None:
            xml = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
            devices = xml.find("devices")
            assert devices is not None
            for interface in devices.findall("interface"):
                devices.remove(interface)
            domain.connect().defineXML(ET.tostring(xml, encoding="unicode"))
            live = ET.fromstring(domain.XMLDesc())
            for interface in live.findall("devices/interface"):
                target = interface.find("target")
                assert target is not None
                ip("link", "delete", target.get("dev", ""))

        await self._with_domain(instance_id, detach)

    async def lose_config_drive(self, instance_id: str) -> None:
        self.paths.config_drive(instance_id).unlink()

    async def nic_count(self, instance_id: str) -> int:
        """Taps that exist: a definition alone plugs nothing."""
        taps, _networks = await self._bridges.census()
        return len(taps)

    async def reopen(self) -> None:
        await self.hypervisor.close()
        self.hypervisor = self._driver()
        await self.hypervisor.open(self.events.append)

    async def daemon_away(self) -> None:
        await self.daemon.hold()

    async def daemon_back(self) -> None:
        await self.daemon.ensure_running()
        async with asyncio.timeout(20 * patience()):
            while True:
                try:
                    await self.hypervisor.inventory()
                    return
                except HypervisorUnavailable:
                    await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.daemon_back()
        try:
            census = await self.hypervisor.census()
            for instance_id in census.set_aside:
                await self.hypervisor.ensure_nothing_aside(instance_id)
            for instance_id in {*census.guests, *census.instance_dirs}:
                await self.hypervisor.ensure_absent(instance_id, keep_disks=False)
        finally:
            await self.hypervisor.close()
            self._volumes.close()
            await self._bridges.remove_everything()


def _kill_emulator(instance_id: str) -> None:
    """By its pid, found by the instance id in its command line: works without the daemon too."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"qemu-system-x86_64") and instance_id.encode() in words:
            descriptor = os.pidfd_open(int(entry.name))
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                ended = select.poll()
                ended.register(descriptor, select.POLLIN)
                assert ended.poll(60_000)
            finally:
                os.close(descriptor)
            return
    raise AssertionError("the guest has no process")
