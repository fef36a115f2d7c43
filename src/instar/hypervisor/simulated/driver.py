"""The hypervisor interface of one simulated host. Given out by `SimulatedWorld.host`; used by the agent and by tests.

Without latencies a call runs through without giving up the event loop: thousands of hosts cost no task and no thread.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from instar.config import SimulatedSettings
from instar.errors import ConsoleUnavailable, DiskFull, HypervisorError, HypervisorUnavailable, NoRunningGuest
from instar.hypervisor.console_offer import OFFER_VALID_S, SocketGrants, console_name, grant_console
from instar.hypervisor.not_yet import NotYet
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.image_check import ImageCheck
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.records import (
    DirectoryGone,
    DiskMade,
    GuestSet,
    ImageCached,
    PortsSet,
    SimulatedGuest,
    simulated_port,
)
from instar.hypervisor.simulated.serial_console import SerialConsoles
from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.guest import (
    ConfigDrive,
    DiskDefinition,
    GuestDefinition,
    GuestEvent,
    GuestState,
    HostCensus,
    HostInventory,
    ImageSource,
    SoftRebootOutcome,
)
from instar.model.network import PortDefinition
from instar.model.states import PowerState
from instar.model.stream import StreamAddress

P = ParamSpec("P")
T = TypeVar("T")


class _MetaData(msgspec.Struct):
    hostname: str = ""


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
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


class SimulatedHypervisor(NotYet):
    """One simulated host, as `hypervisor.contract.Hypervisor`. `faults` makes trouble on demand."""

    def __init__(self, machine: Machine, settings: SimulatedSettings, images: ImageCheck) -> None:
        self.streams: SocketGrants | None = None  # of this host, where it has any: consoles need them
        self._serial_consoles = SerialConsoles(machine)
        self.name = machine.name
        self._images = images
        self.faults = HostFaults(machine)
        self._machine = machine
        self._settings = settings
        self._fetching: dict[str, asyncio.Future[None]] = {}

    async def open(self, on_event: Callable[[GuestEvent], None]) -> None:
        self._machine.on_event = on_event

    async def close(self) -> None:
        await self._serial_consoles.close()
        self._machine.on_event = None

    @_call
    async def inventory(self) -> HostInventory:
        settings, machine = self._settings, self._machine
        used_bytes = sum(sum(directory.disks.values()) for directory in machine.directories.values())
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
        while image.sha256 not in self._machine.images:
            fetching = self._fetching.get(image.sha256)
            if fetching is None:
                await self._fetch(image)
            else:
                await asyncio.wait([fetching])  # then look again: the one who fetched may have failed
        self._machine.use_image(image.sha256)

    async def _fetch(self, image: ImageSource) -> None:
        fetching = self._fetching[image.sha256] = asyncio.get_running_loop().create_future()
        try:
            if self._settings.image_s:
                await asyncio.sleep(self._settings.image_s)
            await self._images.check(image)
            self._machine.change(ImageCached(self.name, image.sha256))
        finally:
            del self._fetching[image.sha256]
            fetching.set_result(None)

    @_call
    async def ensure_disk(self, instance_id: str, disk: DiskDefinition) -> None:
        _check_id(instance_id)
        directory = self._machine.directories.get(instance_id)
        if directory is not None and disk.name in directory.disks:
            return
        if self.faults.disk_full:
            raise DiskFull(filesystem="/", host=self.name)
        if disk.image is not None and disk.image.sha256 not in self._machine.images:
            raise HypervisorError(reason=f"image {disk.image.id} is not in the cache of the host")
        self._machine.change(DiskMade(self.name, instance_id, disk.name, disk.size_bytes))

    @_call
    async def ensure_no_disks(self, instance_id: str) -> None:
        _check_id(instance_id)
        if self._machine.state_of(instance_id).domain_id is not None:
            raise HypervisorError(reason="the disks of a running guest cannot be removed")
        if instance_id in self._machine.directories:
            self._machine.change(DirectoryGone(self.name, instance_id))

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
        _check_id(instance_id)
        if self._machine.state_of(instance_id).domain_id is not None:
            await self._destroy(instance_id)
        self._machine.remove(instance_id)
        self._set_ports(instance_id, ())
        if not keep_disks and instance_id in self._machine.directories:
            self._machine.change(DirectoryGone(self.name, instance_id))

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
        )

    # --- work -----------------------------------------------------------------------------------------------------

    def _set_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        plugged = tuple(simulated_port(port) for port in ports)
        if plugged != self._machine.ports.get(instance_id, ()):
            self._machine.change(PortsSet(self.name, instance_id, plugged))

    async def _start(self, guest: GuestDefinition) -> GuestState:
        _check_id(guest.instance_id)
        directory = self._machine.directories.get(guest.instance_id)
        disks = directory.disks if directory else {}
        if missing := [disk.name for disk in guest.disks if disk.name not in disks]:
            raise HypervisorError(reason=f"disk {missing[0]} does not exist")
        defined = SimulatedGuest(
            guest.instance_id, guest.name, guest.vcpus, guest.memory_mib, _hostname(guest.config_drive) or guest.name,
            tuple(simulated_port(port) for port in guest.ports),
        )
        if self._settings.spawn_s:
            self._machine.change(GuestSet(self.name, defined))
            await asyncio.sleep(self._settings.spawn_s)
        return self._machine.start(defined)

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


def _check_id(instance_id: str) -> None:
    """Ids become file names on real hosts, so nothing but a UUID is taken here either."""
    if not _UUID(instance_id):
        raise HypervisorError(reason="the id of the instance is not a UUID")


def _hostname(config_drive: ConfigDrive | None) -> str:
    """The name that the guest gives itself, as it reads it from its config drive."""
    if config_drive is None:
        return ""
    try:
        name = _decode_meta_data(config_drive.meta_data).hostname
    except msgspec.MsgspecError:
        return ""
    return "".join(letter for letter in name if letter.isprintable() and not letter.isspace())
