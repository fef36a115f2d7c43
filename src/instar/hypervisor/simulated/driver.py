"""The hypervisor interface of one simulated host. Given out by `SimulatedWorld.host`; used by the agent and by tests.

Without latencies a call runs through without giving up the event loop: thousands of hosts cost no task and no thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from instar.config import SimulatedSettings
from instar.errors import ConsoleUnavailable, NoRunningGuest
from instar.hypervisor.console_offer import OFFER_VALID_S, SocketGrants, console_name, grant_console
from instar.hypervisor.contract import Report
from instar.hypervisor.simulated.devices import Devices
from instar.hypervisor.simulated.disks import Disks
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.image_check import ImageCheck
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.moves import FindMachine, Moves
from instar.hypervisor.simulated.neighbours import Neighbours
from instar.hypervisor.simulated.power import Power, simulated_guest
from instar.hypervisor.simulated.records import (
    GuestSet,
)
from instar.hypervisor.simulated.serial_console import SerialConsoles
from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.guest import (
    DiskDefinition,
    DiskOffer,
    GuestDefinition,
    GuestDiagnostics,
    GuestEvent,
    GuestState,
    HostCensus,
    HostInventory,
    ImageSource,
    LiveMigrationOptions,
    LiveTarget,
    SnapshotTaken,
    SnapshotTarget,
    SoftRebootOutcome,
)
from instar.model.network import PortDefinition
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk

P = ParamSpec("P")
T = TypeVar("T")


def _call(
    method: Callable[Concatenate[SimulatedHypervisor, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SimulatedHypervisor, P], Coroutine[Any, Any, T]]:
    """A call that meets the host's faults before its work and after it."""
    name = method.__name__

    @functools.wraps(method)
    async def call(self: SimulatedHypervisor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        await self.faults.meet(name, after_work=False)
        result = await method(self, *args, **kwargs)
        await self.faults.meet(name, after_work=True)
        return result

    return call


class SimulatedHypervisor:
    """One simulated host, as `hypervisor.contract.Hypervisor`. `faults` makes trouble on demand, and shows what guests
    have in memory and on their disks. The work is done in power, disks, moves and devices."""

    def __init__(
        self, machine: Machine, settings: SimulatedSettings, images: ImageCheck, find: FindMachine = lambda _name: None
    ) -> None:
        self.streams: SocketGrants | None = None  # of this host, where it has any: consoles need them
        self._serial_consoles = SerialConsoles(machine)
        self.name = machine.name
        self.faults = HostFaults(machine)
        self._machine = machine
        self._settings = settings
        self._disks = Disks(machine, settings, images, self.faults)
        self._moves = Moves(machine, settings, self._disks, self.faults, find)
        self._devices = Devices(machine, settings, self.faults)
        self._power = Power(machine, settings, self._disks, self.faults)

    def know(self, neighbours: Neighbours) -> None:
        """Hosts of other processes can be reached from now on."""
        self._moves.neighbours = neighbours

    async def open(self, on_event: Callable[[GuestEvent], None]) -> None:
        self._machine.on_event = on_event

    async def close(self) -> None:
        await self._serial_consoles.close()
        self._machine.on_event = None

    @_call
    async def inventory(self) -> HostInventory:
        settings, machine = self._settings, self._machine
        directories = (*machine.directories.values(), *machine.aside.values())
        used_bytes = sum(disk.size_bytes for directory in directories for disk in directory.disks.values())
        return HostInventory(
            vcpus=settings.vcpus,
            memory_mib=settings.memory_mib,
            disk_gib=settings.disk_gib,
            hypervisor_type="simulated",
            hypervisor_version=1,
            hypervisor_hostname=self.name,
            cpu_model="simulated",
            virt_type="simulated",
            running_vms=sum(guest.domain_id is not None for guest in machine.guests.values()),
            free_disk_gib=max(0, settings.disk_gib - (used_bytes >> 30)),
        )

    @_call
    async def observe(self, instance_id: str) -> GuestState:
        return self._machine.state_of(instance_id)

    @_call
    async def ensure_image(self, image: ImageSource) -> None:
        await self._disks.fetch(image)

    @_call
    async def ensure_disk(self, instance_id: str, disk: DiskDefinition) -> None:
        self._disks.make(instance_id, disk)

    @_call
    async def ensure_no_disks(self, instance_id: str) -> None:
        self._disks.remove_all(instance_id)

    @_call
    async def ensure_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        self._machine.set_ports(instance_id, ports)

    @_call
    async def ensure_no_ports(self, instance_id: str) -> None:
        self._machine.set_ports(instance_id, ())
        guest = self._machine.guests.get(instance_id)
        if guest is not None and guest.ports:
            self._machine.change(GuestSet(self.name, msgspec.structs.replace(guest, ports=())))

    @_call
    async def ensure_running(self, guest: GuestDefinition) -> GuestState:
        return await self._power.ensure_running(guest)

    @_call
    async def ensure_restarted(self, guest: GuestDefinition, *, was_domain_id: int | None) -> GuestState:
        return await self._power.ensure_restarted(guest, was_domain_id=was_domain_id)

    @_call
    async def ensure_stopped(self, instance_id: str, *, grace_s: float) -> GuestState:
        return await self._power.ensure_stopped(instance_id, grace_s=grace_s)

    @_call
    async def await_soft_reboot(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        return await self._power.await_soft_reboot(instance_id, was_domain_id=was_domain_id, wait_s=wait_s)

    @_call
    async def ensure_absent(self, instance_id: str, *, keep_disks: bool) -> None:
        await self._power.ensure_absent(instance_id, keep_disks=keep_disks)

    @_call
    async def ensure_paused(self, instance_id: str) -> GuestState:
        return self._power.ensure_paused(instance_id)

    @_call
    async def ensure_suspended(self, instance_id: str) -> GuestState:
        return await self._power.ensure_suspended(instance_id)

    # --- disks ----------------------------------------------------------------------------------------------------

    @_call
    async def ensure_disk_size(self, instance_id: str, disk: DiskDefinition) -> None:
        self._disks.grow(instance_id, disk)

    @_call
    async def ensure_no_disk(self, instance_id: str, name: str) -> None:
        self._disks.remove(instance_id, name)

    @_call
    async def ensure_disk_kept(self, instance_id: str, name: str) -> None:
        self._disks.keep(instance_id, name)

    @_call
    async def ensure_disk_restored(self, instance_id: str, name: str) -> None:
        self._disks.restore(instance_id, name)

    @_call
    async def take_snapshot(self, instance_id: str, disk: str, target: SnapshotTarget, report: Report) -> SnapshotTaken:
        return await self._disks.snapshot(instance_id, disk, target, report)

    # --- moves ----------------------------------------------------------------------------------------------------

    @_call
    async def stream_address(self) -> StreamAddress:
        return self._moves.address()

    @_call
    async def ensure_set_aside(self, instance_id: str) -> None:
        await self._moves.set_aside(instance_id)

    @_call
    async def offer_disks(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        return self._moves.offer(instance_id, to)

    @_call
    async def receive_disks(self, instance_id: str, offer: DiskOffer, report: Report) -> None:
        await self._moves.receive(instance_id, offer, report)

    @_call
    async def ensure_brought_back(self, instance_id: str) -> None:
        self._moves.bring_back(instance_id)

    @_call
    async def ensure_nothing_aside(self, instance_id: str) -> None:
        self._moves.forget_aside(instance_id)

    @_call
    async def ensure_ready_for_live(self, guest: GuestDefinition, offer: DiskOffer) -> LiveTarget:
        target = self._moves.make_ready(guest.instance_id, offer)
        self._machine.set_ports(guest.instance_id, guest.ports)
        return target

    @_call
    async def offer_live(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        return self._moves.offer_live(instance_id, to)

    @_call
    async def migrate_live(
        self, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, report: Report
    ) -> None:
        await self._moves.migrate(simulated_guest(guest), target, report)

    @_call
    async def abort_live(self, instance_id: str) -> None:
        self._moves.abort(instance_id)

    @_call
    async def force_live(self, instance_id: str) -> None:
        self._moves.force(instance_id)

    # --- devices --------------------------------------------------------------------------------------------------

    @_call
    async def ensure_port_plugged(self, guest: GuestDefinition, port_id: str) -> None:
        await self._devices.plug_port(guest, port_id)

    @_call
    async def ensure_port_unplugged(self, instance_id: str, port_id: str) -> None:
        await self._devices.unplug_port(instance_id, port_id)

    @_call
    async def ensure_volume_attached(self, guest: GuestDefinition, volume_id: str) -> None:
        await self._devices.attach_volume(guest, volume_id)

    @_call
    async def ensure_volume_detached(self, instance_id: str, volume_id: str) -> None:
        await self._devices.detach_volume(instance_id, volume_id)

    @_call
    async def swap_volume(self, instance_id: str, old_volume_id: str, new: VolumeDisk, report: Report) -> None:
        await self._devices.swap_volume(instance_id, old_volume_id, new, report)

    # --- questions and small wishes -------------------------------------------------------------------------------

    @_call
    async def set_password(self, instance_id: str, user: str, password: str) -> None:
        self._devices.set_password(instance_id)

    @_call
    async def has_guest_agent(self, instance_id: str) -> bool:
        return self._devices.has_agent(instance_id)

    @_call
    async def diagnostics(self, instance_id: str) -> GuestDiagnostics:
        return self._devices.diagnostics(instance_id)

    @_call
    async def console_output(self, instance_id: str, *, length_bytes: int) -> bytes:
        directory = self._machine.directories.get(instance_id)
        return bytes(directory.console[-length_bytes:]) if directory and length_bytes > 0 else b""

    @_call
    async def offer_console(self, instance_id: str, kind: ConsoleKind, to: StreamAddress | None) -> ConsoleOffer:
        if kind is not ConsoleKind.SERIAL or self.streams is None:
            raise ConsoleUnavailable(kind=kind.value)  # simulated guests have no screen
        if self._machine.state_of(instance_id).domain_id is None:
            raise NoRunningGuest(id=instance_id)
        if to is None:
            return ConsoleOffer(self.streams.address, console_name(instance_id, kind))
        path = await self._serial_consoles.open(instance_id, valid_s=OFFER_VALID_S)
        return grant_console(self.streams, instance_id, kind, path, to)

    @_call
    async def census(self) -> HostCensus:
        machine = self._machine
        running = [guest for guest in machine.guests.values() if guest.domain_id is not None]
        return HostCensus(
            guests={instance_id: guest.state() for instance_id, guest in machine.guests.items()},
            instance_dirs=tuple(sorted(machine.directories)),
            taps=tuple(sorted(port.tap_name for guest in running for port in guest.ports)),
            networks=tuple(sorted({port.network_id for ports in machine.ports.values() for port in ports})),
            cached_images=tuple(sorted(machine.images)),
            set_aside=tuple(sorted(machine.aside)),
            with_ports=tuple(sorted(instance_id for instance_id, ports in machine.ports.items() if ports)),
        )
