"""Guests of a simulated host are started and ended, held still and brought back. Called by the driver.

What happens at one moment is in machine.py; here is what takes time, and what a host refuses.
"""

from __future__ import annotations

import asyncio
import functools

import msgspec

from instar.config import SimulatedSettings
from instar.errors import HypervisorError, HypervisorUnavailable
from instar.hypervisor.simulated.disks import Disks, check_id
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.records import DirectoryGone, GuestSet, SimulatedGuest, simulated_port, simulated_volume
from instar.model.guest import ConfigDrive, GuestDefinition, GuestState, SoftRebootOutcome
from instar.model.states import PowerState

AGENT_IS_THERE = frozenset({"yes", "true", "1", "on"})  # values of the image property hw_qemu_guest_agent


class _MetaData(msgspec.Struct):
    hostname: str = ""


_decode_meta_data = msgspec.json.Decoder(_MetaData).decode


class Power:
    __slots__ = ("_disks", "_faults", "_machine", "_settings")

    def __init__(self, machine: Machine, settings: SimulatedSettings, disks: Disks, faults: HostFaults) -> None:
        self._machine = machine
        self._settings = settings
        self._disks = disks
        self._faults = faults

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

    async def ensure_restarted(self, guest: GuestDefinition, *, was_domain_id: int | None) -> GuestState:
        state = self._machine.state_of(guest.instance_id)
        if state.domain_id is not None:
            if state.domain_id != was_domain_id:
                return state
            await self._destroy(guest.instance_id)
        self._machine.set_ports(guest.instance_id, guest.ports)
        return await self._start(guest)

    async def ensure_stopped(self, instance_id: str, *, grace_s: float) -> GuestState:
        state = self._machine.state_of(instance_id)
        # A paused guest cannot hear the power button: waiting for it would be in vain.
        if grace_s > 0 and state.power_state is PowerState.RUNNING:
            await self._power_button(instance_id, grace_s)
        if self._machine.state_of(instance_id).domain_id is not None:
            await self._destroy(instance_id)
        self._machine.forget_saved(instance_id)
        return self._machine.state_of(instance_id)

    async def await_soft_reboot(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        if self._machine.state_of(instance_id).domain_id == was_domain_id:
            await self._power_button(instance_id, wait_s)
        state = self._machine.state_of(instance_id)
        if state.domain_id == was_domain_id:
            return SoftRebootOutcome("timed_out", state)
        return SoftRebootOutcome("shut_down" if state.domain_id is None else "restarted", state)

    async def ensure_absent(self, instance_id: str, *, keep_disks: bool) -> None:
        check_id(instance_id)
        if self._machine.state_of(instance_id).domain_id is not None:
            await self._destroy(instance_id)
        self._machine.remove(instance_id)
        self._machine.set_ports(instance_id, ())
        if not keep_disks and instance_id in self._machine.directories:
            self._machine.change(DirectoryGone(self._machine.name, instance_id))

    def ensure_paused(self, instance_id: str) -> GuestState:
        if self._machine.running(instance_id) is None:
            raise HypervisorError(reason="the guest does not run")
        return self._machine.set_paused(instance_id, True)

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

    async def _start(self, guest: GuestDefinition) -> GuestState:
        check_id(guest.instance_id)
        defined = simulated_guest(guest)
        self._check_disks(defined)
        if self._settings.spawn_s:
            self._machine.change(GuestSet(self._machine.name, defined))
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
        if not self._faults.ignores_acpi:
            press = functools.partial(
                self._machine.press_power_button, instance_id, domain_id, reboots=self._faults.reboots_on_acpi
            )
            if self._settings.shutdown_s:
                loop.call_later(self._settings.shutdown_s, press)  # the guest goes on shutting down if we stop waiting
            else:
                press()
        deadline = loop.time() + wait_s
        while self._machine.state_of(instance_id).domain_id == domain_id:
            changed = await self._machine.wait_for_change(instance_id, deadline - loop.time())
            if self._machine.away:
                raise HypervisorUnavailable(host=self._machine.name)
            if not changed:
                return


@functools.lru_cache(maxsize=256)
def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Most guests have the same few disks: one tuple for all of them."""
    return names


def simulated_guest(guest: GuestDefinition) -> SimulatedGuest:
    """What the host keeps of a definition."""
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
