"""Network cards and volumes of a guest on a simulated host, and what it tells of itself. Called by the driver."""

from __future__ import annotations

import asyncio

import msgspec

from instar.config import SimulatedSettings
from instar.errors import GuestAgentMissing, HypervisorError
from instar.hypervisor.contract import Report
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.machine import Machine, boot_disk, ran_us
from instar.hypervisor.simulated.progress import take_time
from instar.hypervisor.simulated.records import (
    GuestSet,
    SimulatedGuest,
    SimulatedVolume,
    VolumeWritten,
    simulated_port,
    simulated_volume,
)
from instar.model.guest import DiskDiagnostics, GuestDefinition, GuestDiagnostics, NicDiagnostics, WorkProgress
from instar.model.states import PowerState
from instar.model.volume import VolumeDisk


class Devices:
    __slots__ = ("_faults", "_machine", "_settings")

    def __init__(self, machine: Machine, settings: SimulatedSettings, faults: HostFaults) -> None:
        self._machine = machine
        self._settings = settings
        self._faults = faults

    async def plug_port(self, wanted: GuestDefinition, port_id: str) -> None:
        port = next((port for port in wanted.ports if port.id == port_id), None)
        if port is None:
            raise HypervisorError(reason=f"port {port_id} is not one of the guest's")
        guest = self._machine.running(wanted.instance_id)
        if guest is None or any(plugged.id == port_id for plugged in guest.ports):
            return
        if all(known.id != port_id for known in self._machine.ports.get(wanted.instance_id, ())):
            raise HypervisorError(reason=f"port {port_id} is not known on the host")
        guest = await self._with_time(guest)
        self._set(guest, ports=(*guest.ports, simulated_port(port)))

    async def unplug_port(self, instance_id: str, port_id: str) -> None:
        guest = self._machine.guests.get(instance_id)
        if guest is None or all(port.id != port_id for port in guest.ports):
            return
        guest = await self._let_go(guest, "network interface")
        self._set(guest, ports=tuple(port for port in guest.ports if port.id != port_id))

    async def attach_volume(self, wanted: GuestDefinition, volume_id: str) -> None:
        volume = next((volume for volume in wanted.volumes if volume.volume_id == volume_id), None)
        if volume is None:
            raise HypervisorError(reason=f"volume {volume_id} is not one of the guest's")
        guest = self._machine.running(wanted.instance_id)
        if guest is None or _has(guest, volume_id):
            return
        if any(other.device == volume.device for other in guest.volumes):
            raise HypervisorError(reason=f"the guest has another disk as {volume.device}")
        guest = await self._with_time(guest)
        self._set(guest, volumes=(*guest.volumes, simulated_volume(volume)))

    async def detach_volume(self, instance_id: str, volume_id: str) -> None:
        guest = self._machine.guests.get(instance_id)
        if guest is None or not _has(guest, volume_id):
            return
        guest = await self._let_go(guest, "volume")
        self._set(guest, volumes=tuple(volume for volume in guest.volumes if volume.volume_id != volume_id))

    async def swap_volume(self, instance_id: str, old_volume_id: str, new: VolumeDisk, report: Report) -> None:
        guest = self._machine.running(instance_id)
        if guest is None:
            raise HypervisorError(reason="the guest does not run")
        if _has(guest, new.volume_id) and not _has(guest, old_volume_id):
            return
        if not _has(guest, old_volume_id):
            raise HypervisorError(reason=f"the guest has no volume {old_volume_id}")
        await take_time(self._settings.attach_s, instance_id, report)
        guest = self._still(guest)
        volumes = tuple(_swapped(volume, old_volume_id, new) for volume in guest.volumes)
        content = self._machine.contents.of_volume(old_volume_id)
        self._machine.change(
            VolumeWritten(self._machine.name, new.volume_id, content),
            GuestSet(self._machine.name, msgspec.structs.replace(guest, volumes=volumes)),
        )
        report(WorkProgress(instance_id, 100))

    def has_agent(self, instance_id: str) -> bool:
        """The guest runs, and its image says that it has an agent."""
        guest = self._machine.running(instance_id)
        return guest is not None and guest.power_state is PowerState.RUNNING and guest.has_agent

    def set_password(self, instance_id: str) -> None:
        """The password itself goes nowhere: only how often one was set is kept, on the disk that the guest boots from."""
        guest = self._machine.running(instance_id)
        if guest is None or not self.has_agent(instance_id):
            raise GuestAgentMissing(id=instance_id, what="set passwords")
        disk = boot_disk(guest)
        content = self._machine.content_of(guest, disk)
        if content is not None:
            changed = msgspec.structs.replace(content, passwords_set=content.passwords_set + 1)
            self._machine.change(self._machine.content_change(guest, disk, changed))

    def diagnostics(self, instance_id: str) -> GuestDiagnostics:
        guest = self._machine.running(instance_id)
        if guest is None:
            raise HypervisorError(reason="the guest does not run")
        ran = ran_us(guest)
        disk = DiskDiagnostics(read_bytes=0, read_requests=0, write_bytes=0, write_requests=0, errors_count=0)
        return GuestDiagnostics(
            power_state=guest.power_state,
            driver="simulated",
            hypervisor="simulated",
            uptime_s=ran // 1_000_000,
            vcpu_times_ns=(ran * 1000,) * guest.vcpus,
            memory_maximum_mib=guest.memory_mib,
            memory_used_mib=guest.memory_mib,
            nics=tuple(NicDiagnostics(port.mac_address, 0, 0, 0, 0, 0, 0, 0, 0) for port in guest.ports),
            disks=(disk,) * (len(guest.disks) + len(guest.volumes)),
            config_drive=guest.has_config_drive,
        )

    def _set(self, guest: SimulatedGuest, **changes: object) -> None:
        self._machine.change(GuestSet(self._machine.name, msgspec.structs.replace(guest, **changes)))

    async def _let_go(self, guest: SimulatedGuest, what: str) -> SimulatedGuest:
        """A running guest lets go of a device, in its time; one that is off has nothing to say. As it is after that."""
        if guest.domain_id is None:
            return guest
        if guest.power_state is PowerState.PAUSED:
            raise HypervisorError(reason="the guest is paused, it cannot let go of a device")
        if self._faults.keeps_devices:
            raise HypervisorError(reason=f"the guest does not let go of the {what}")
        return await self._with_time(guest)

    async def _with_time(self, guest: SimulatedGuest) -> SimulatedGuest:
        if self._settings.attach_s:
            await asyncio.sleep(self._settings.attach_s)
        return self._still(guest)

    def _still(self, guest: SimulatedGuest) -> SimulatedGuest:
        """The guest as it is now. Raises HypervisorError when it ended meanwhile."""
        now = self._machine.running(guest.instance_id)
        if now is None or now.domain_id != guest.domain_id:
            raise HypervisorError(reason="the guest ended meanwhile")
        return now


def _has(guest: SimulatedGuest, volume_id: str) -> bool:
    return any(volume.volume_id == volume_id for volume in guest.volumes)


def _swapped(volume: SimulatedVolume, old_volume_id: str, new: VolumeDisk) -> SimulatedVolume:
    if volume.volume_id != old_volume_id:
        return volume
    return SimulatedVolume(new.volume_id, volume.device, volume.boot_index)
