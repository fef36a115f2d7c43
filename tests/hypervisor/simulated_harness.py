"""The simulated host under the contract suite: its faults make the trouble, its own log is what another process finds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

from instar.config import SimulatedSettings
from instar.hypervisor.simulated import SimulatedHypervisor, SimulatedWorld
from instar.model.guest import GuestEvent, ImageSource
from instar.model.network import NetworkDefinition, SubnetDefinition
from instar.model.volume import VolumeConnection

SUBNET = SubnetDefinition(id="subnet", cidr="10.213.77.0/24", gateway_ip="10.213.77.1")


class SimulatedHarness:
    """One host of a world of its own, under `directory`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.events: list[GuestEvent] = []
        self._directory = directory
        self._image = directory / "image.raw"
        self._image.write_bytes(b"a guest that needs no machine")
        self._world = self._opened_world()
        self.hypervisor: SimulatedHypervisor = self._world.host("host")

    @classmethod
    async def opened(cls, directory: Path) -> SimulatedHarness:
        harness = cls(directory)
        await harness.hypervisor.open(harness.events.append)
        return harness

    def _opened_world(self) -> SimulatedWorld:
        return SimulatedWorld(self._directory / "world.log", SimulatedSettings())

    def image(self, *, heeds_power_button: bool = True) -> ImageSource:
        self.hypervisor.faults.ignores_acpi = self.hypervisor.faults.keeps_devices = not heeds_power_button
        content = self._image.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        return ImageSource("image", self._image.as_uri(), "raw", sha256, len(content), len(content))

    def broken_image(self) -> ImageSource:
        return ImageSource("broken", self._image.as_uri(), "raw", "0" * 64, 1, 1)

    def network(self) -> NetworkDefinition:
        return NetworkDefinition(id="network", mtu=1450, subnets=(SUBNET,))

    async def volume(self, *, size_bytes: int = 1 << 20, over_tcp: bool = False) -> VolumeConnection:
        export = uuid4().hex
        if over_tcp:
            return VolumeConnection(export, address="127.0.0.1", port=10809, size_bytes=size_bytes)
        return VolumeConnection(export, socket=f"/run/volumes/{export}.sock", size_bytes=size_bytes)

    async def wait_until_booted(self, instance_id: str, *, boots: int) -> None:
        """It boots in no time: a start that a real guest would not have lived to count counts here."""
        console = await self.hypervisor.console_output(instance_id, length_bytes=10_000)
        markers = [line for line in console.decode().splitlines() if line.startswith("INSTAR-BOOT ")]
        assert int(markers[-1].split()[1].removeprefix("count=")) >= boots

    async def kill_guest(self, instance_id: str) -> None:
        self.hypervisor.faults.guest_dies(instance_id)

    async def pause_guest(self, instance_id: str) -> None:
        self.hypervisor.faults.guest_pauses(instance_id)

    async def lose_domain(self, instance_id: str) -> None:
        self.hypervisor.faults.guest_vanishes(instance_id)

    async def detach_nics(self, instance_id: str) -> None:
        self.hypervisor.faults.guest_loses_nics(instance_id)

    async def lose_config_drive(self, instance_id: str) -> None:
        """A simulated guest's config drive is read when it starts and is no file."""

    async def nic_count(self, instance_id: str) -> int:
        return len((await self.hypervisor.census()).taps)

    async def reopen(self) -> None:
        self._world.close()
        self._world = self._opened_world()
        self.hypervisor = self._world.host("host")
        await self.hypervisor.open(self.events.append)

    async def daemon_away(self) -> None:
        self.hypervisor.faults.down = True

    async def daemon_back(self) -> None:
        self.hypervisor.faults.down = False

    async def close(self) -> None:
        await self.hypervisor.close()
        self._world.close()
