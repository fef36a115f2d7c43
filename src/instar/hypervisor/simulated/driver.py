"""The hypervisor interface of one simulated host. Given out by `SimulatedWorld.host`; used by the agent and by tests.

Without latencies a call runs through without giving up the event loop: thousands of hosts cost no task and no thread.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from instar.config import SimulatedSettings
from instar.errors import ConsoleUnavailable, HypervisorError, HypervisorUnavailable, NoRunningGuest
from instar.hypervisor.console_offer import OFFER_VALID_S, SocketGrants, console_name, grant_console
from instar.hypervisor.contract import Report
from instar.hypervisor.simulated.devices import Devices
from instar.hypervisor.simulated.disks import Disks, check_id
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.image_check import ImageCheck
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.moves import FindMachine, Moves
from instar.hypervisor.simulated.records import (
    DirectoryGone,
    GuestSet,
    PortsSet,
    SimulatedGuest,
    simulated_port,
    simulated_volume,
)
from instar.hypervisor.simulated.serial_console import SerialConsoles
from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.guest import (
    ConfigDrive,
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
from instar.model.states import PowerState
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk

P = ParamSpec("P")
T = TypeVar("T")


AGENT_IS_THERE = frozenset({"yes", "true", "1", "on"})  # values of the image property hw_qemu_guest_agent


class _MetaData(msgspec.Struct):
    hostname: str = ""


_decode_meta_data = msgspec.json.Decoder(_MetaData).decode


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
    have in memory and on their disks. One file, since it is one interface: the work is in disks, moves and devices."""

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
        self._set_ports(instance_id, ports)

    @_call
    async def ensure_no_ports(self, instance_id: str) -> None:
        self._set_ports(instance_id, ())
        guest = self._machine.guests.get(instance_id)
        if guest is not None and guest.ports:
            self._machine.change(GuestSet(self.name, msgspec.structs.replace(guest, ports=())))

    @_call
    async def ensure_running(self, guest: GuestDefinition) -> GuestState:
        state = self._machine.state_of(guest.instance_id)
        if state.power_state is PowerState.PAUSED:
            return self._machine.set_paused(guest.instance_id, False)
        if state.domain_id is not None:
            return state
        known = {port.id for port in self._machine.ports.get(guest.instance_id, ())}
        if missing := [port.id for port in guest.ports if port.id not in known]:
            raise HypervisorError(reason=f"port {missing[0]} is not known on the host")
        defined = self._machine.guests.get(guest.instance_id)
        if defined is not None and defined.saved:
            return await self._go_on(defined)
        return await self._start(guest)

    @_call
    async def ensure_restarted(self, guest: GuestDefinition, *, was_domain_id: int | None) -> GuestState:
        state = self._machine.state_of(guest.instance_id)
        if state.domain_id is not None:
            if state.domain_id != was_domain_id:
                return state
            await self._destroy(guest.instance_id)
        self._set_ports(guest.instance_id, guest.ports)
        return await self._start(guest)

    @_call
    async def ensure_stopped(self, instance_id: str, *, grace_s: float) -> GuestState:
        state = self._machine.state_of(instance_id)
        # A paused guest cannot hear the power button: waiting for it would be in vain.
        if grace_s > 0 and state.power_state is PowerState.RUNNING:
            await self._power_button(instance_id, grace_s)
        if self._machine.state_of(instance_id).domain_id is not None:
            await self._destroy(instance_id)
        self._machine.forget_saved(instance_id)
        return self._machine.state_of(instance_id)

    @_call
    async def await_soft_reboot(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        if self._machine.state_of(instance_id).domain_id == was_domain_id:
            await self._power_button(instance_id, wait_s)
        state = self._machine.state_of(instance_id)
        if state.domain_id == was_domain_id:
            return SoftRebootOutcome("timed_out", state)
        return SoftRebootOutcome("shut_down" if state.domain_id is None else "restarted", state)

    @_call
    async def ensure_absent(self, instance_id: str, *, keep_disks: bool) -> None:
        check_id(instance_id)
        if self._machine.state_of(instance_id).domain_id is not None:
            await self._destroy(instance_id)
        self._machine.remove(instance_id)
        self._set_ports(instance_id, ())
        if not keep_disks and instance_id in self._machine.directories:
            self._machine.change(DirectoryGone(self.name, instance_id))

    # --- memory ---------------------------------------------------------------------------------------------------

    @_call
    async def ensure_paused(self, instance_id: str) -> GuestState:
        if self._machine.running(instance_id) is None:
            raise HypervisorError(reason="the guest does not run")
        return self._machine.set_paused(instance_id, True)

    @_call
    async def ensure_suspended(self, instance_id: str) -> GuestState:
        guest = self._machine.guests.get(instance_id)
        if guest is not None and guest.saved:
            return guest.state()
        running = self._machine.running(instance_id)
        if running is not None:
            self._disks.check_room()
            if self._settings.suspend_s:
                await asyncio.sleep(self._settings.suspend_s)
                running = self._machine.running(instance_id)  # it may have ended by itself meanwhile
        if running is None:
            raise HypervisorError(reason="the guest does not run")
        return self._machine.save(instance_id)

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
        return self._moves.offer(instance_id)

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
        self._set_ports(guest.instance_id, guest.ports)
        return target

    @_call
    async def offer_live(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        return self._moves.offer_live(instance_id)

    @_call
    async def migrate_live(
        self, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, report: Report
    ) -> None:
        await self._moves.migrate(_defined(guest), target, report)

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

    # --- work -----------------------------------------------------------------------------------------------------

    def _set_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        plugged = tuple(simulated_port(port) for port in ports)
        if plugged != self._machine.ports.get(instance_id, ()):
            self._machine.change(PortsSet(self.name, instance_id, plugged))

    async def _start(self, guest: GuestDefinition) -> GuestState:
        check_id(guest.instance_id)
        defined = _defined(guest)
        self._check_disks(defined)
        if self._settings.spawn_s:
            self._machine.change(GuestSet(self.name, defined))
            await asyncio.sleep(self._settings.spawn_s)
        return self._machine.start(defined)

    async def _go_on(self, guest: SimulatedGuest) -> GuestState:
        """Its memory was saved."""
        self._check_disks(guest)
        if self._settings.suspend_s:
            await asyncio.sleep(self._settings.suspend_s)
        return self._machine.load(guest)

    def _check_disks(self, guest: SimulatedGuest) -> None:
        disks = self._machine.disks_of(guest.instance_id)
        if missing := [name for name in guest.disks if name not in disks]:
            raise HypervisorError(reason=f"disk {missing[0]} does not exist")

    async def _destroy(self, instance_id: str) -> None:
        if self._settings.destroy_s:
            await asyncio.sleep(self._settings.destroy_s)
        self._machine.stop(instance_id, "stopped")

    async def _power_button(self, instance_id: str, wait_s: float) -> None:
        """Press it, and wait until the guest that runs now does not run any more, or `wait_s`."""
        domain_id = self._machine.state_of(instance_id).domain_id
        if domain_id is None:
            return
        loop = asyncio.get_running_loop()
        if not self.faults.ignores_acpi:
            press = functools.partial(
                self._machine.press_power_button, instance_id, domain_id, reboots=self.faults.reboots_on_acpi
            )
            if self._settings.shutdown_s:
                loop.call_later(self._settings.shutdown_s, press)  # the guest goes on shutting down if we stop waiting
            else:
                press()
        deadline = loop.time() + wait_s
        while self._machine.state_of(instance_id).domain_id == domain_id:
            changed = await self._machine.wait_for_change(instance_id, deadline - loop.time())
            if self._machine.away:
                raise HypervisorUnavailable(host=self.name)
            if not changed:
                return


@functools.lru_cache(maxsize=256)
def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Most guests have the same few disks: one tuple for all of them."""
    return names


def _defined(guest: GuestDefinition) -> SimulatedGuest:
    return SimulatedGuest(
        guest.instance_id,
        guest.name,
        guest.vcpus,
        guest.memory_mib,
        _hostname(guest.config_drive) or guest.name,
        tuple(simulated_port(port) for port in guest.ports),
        disks=_names(tuple(disk.name for disk in guest.disks)),
        volumes=tuple(simulated_volume(volume) for volume in guest.volumes),
        has_agent=guest.properties.get("hw_qemu_guest_agent", "").lower() in AGENT_IS_THERE,
        has_config_drive=guest.config_drive is not None,
    )


def _hostname(config_drive: ConfigDrive | None) -> str:
    """The name that the guest gives itself, as it reads it from its config drive."""
    if config_drive is None:
        return ""
    try:
        name = _decode_meta_data(config_drive.meta_data).hostname
    except msgspec.MsgspecError:
        return ""
    return "".join(letter for letter in name if letter.isprintable() and not letter.isspace())
