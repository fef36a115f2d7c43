"""The power of a guest: defined, started, ended, its button pressed. The driver calls it.

A start makes good what is missing, and lets a guest with a saved memory go on from there (memory.py). What is done with
the domain itself is in domains.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from instar.errors import HypervisorError
from instar.hypervisor.contract import HostNetwork
from instar.hypervisor.libvirt import config_drive, console, domains, memory, ownership
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.console import CONSOLE_SOCKETS
from instar.hypervisor.libvirt.domain_xml import DomainFiles, HostFacts, domain_xml
from instar.hypervisor.libvirt.guest_events import GuestEvents
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.console import ConsoleKind
from instar.model.guest import DiskDefinition, GuestDefinition, GuestState, SoftRebootOutcome
from instar.model.states import PowerState

EnsureDisk = Callable[[str, DiskDefinition], Awaitable[None]]

log = structlog.get_logger()


class GuestPower:
    """The guests of one host. `ensure_disk` makes a disk of an instance whose base image is in the cache."""

    def __init__(
        self,
        connection: LibvirtConnection,
        events: GuestEvents,
        paths: HostPaths,
        images: ImageCache,
        network: HostNetwork,
        *,
        ensure_disk: EnsureDisk,
        settings: LibvirtSettings,
        host: str,
    ) -> None:
        self._connection, self._events, self._network = connection, events, network
        self._paths, self._images, self._ensure_disk = paths, images, ensure_disk
        self._settings, self._host = settings, host
        self._starts = asyncio.Semaphore(settings.starts_max)

    async def observe(self, instance_id: str) -> GuestState:
        return await self._connection.run(lambda connection: domains.observe(connection, instance_id))

    async def ensure_running(self, guest: GuestDefinition, facts: HostFacts) -> GuestState:
        state, saved = await self._connection.run(
            lambda connection: domains.observe_with_memory(connection, guest.instance_id)
        )
        if state.domain_id is None:
            state = await self._start(guest, facts, saved=saved)
        return await self._until_running(guest.instance_id, state)

    async def ensure_restarted(
        self, guest: GuestDefinition, facts: HostFacts, *, was_domain_id: int | None
    ) -> GuestState:
        instance_id = guest.instance_id
        state = await self.observe(instance_id)
        if state.domain_id is not None and state.domain_id != was_domain_id:
            return await self._until_running(instance_id, state)
        ending = asyncio.ensure_future(self._end(instance_id))
        try:  # libvirt waits a fifth of a second for a guest's process to end: time to prepare the next one
            await self._network.ensure_ports(instance_id, guest.ports)
            for disk in guest.disks:
                await self._restore_disk(instance_id, disk)
            await self._write_config_drive(guest)
        finally:
            await ending
        state = await self._start(guest, facts)
        if state.domain_id == was_domain_id:
            # A daemon that was restarted counts its ids from one again. The caller must see another one.
            await self.destroy(instance_id)
            state = await self._start(guest, facts)
        return await self._until_running(instance_id, state)

    async def ensure_stopped(self, instance_id: str, *, grace_s: float) -> GuestState:
        state = await self.observe(instance_id)
        # A paused guest cannot hear the button.
        if state.domain_id is not None and state.power_state == PowerState.RUNNING and grace_s > 0:
            state = await self._shut_down(instance_id, was_domain_id=state.domain_id, wait_s=grace_s)
        if state.domain_id is None:
            return state
        return await self.destroy(instance_id)

    async def await_soft_reboot(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        state = await self._shut_down(instance_id, was_domain_id=was_domain_id, wait_s=wait_s)
        if state.domain_id is None:
            return SoftRebootOutcome(outcome="shut_down", state=state)
        outcome = "timed_out" if state.domain_id == was_domain_id else "restarted"
        return SoftRebootOutcome(outcome=outcome, state=state)

    async def destroy(self, instance_id: str) -> GuestState:
        """The guest is off at once; it stays defined."""
        return await self._connection.run(
            lambda connection: domains.destroy(connection, instance_id), timeout_s=self._settings.destroy_timeout_s
        )

    async def undefine(self, instance_id: str) -> None:
        """libvirt knows nothing of the guest, nor of its saved memory. It is off."""
        await self._connection.run(lambda connection: domains.undefine(connection, instance_id))

    async def must_be_off(self, instance_id: str) -> None:
        """Raises HypervisorError while the guest runs, or when the id is no UUID."""
        self._paths.instance(instance_id)
        if (await self.observe(instance_id)).domain_id is not None:
            raise HypervisorError(reason="the guest still runs, its disks are left alone")

    async def _start(self, guest: GuestDefinition, facts: HostFacts, *, saved: bool = False) -> GuestState:
        """Define and start the guest, or let it go on from its `saved` memory. In the first case its config drive is
        written anew, for what it says may have changed; a guest with a memory still knows the old one."""
        if not saved:
            await self._write_config_drive(guest)
        files = await asyncio.to_thread(self._domain_files, guest)
        xml = domain_xml(guest, files, facts, settings=self._settings, bridge_name=self._network.bridge_name)
        self._events.expect(guest.instance_id)
        begin = memory.bring_back if saved else domains.start
        limit_s = self._settings.memory_timeout_s if saved else self._settings.start_timeout_s
        async with self._starts:
            return await self._connection.run(
                lambda connection: begin(connection, guest.instance_id, xml), timeout_s=limit_s
            )

    async def _end(self, instance_id: str) -> None:
        await self.destroy(instance_id)
        await self.undefine(instance_id)

    async def _write_config_drive(self, guest: GuestDefinition) -> None:
        if guest.config_drive is not None:
            path = self._paths.config_drive(guest.instance_id)
            await config_drive.write_config_drive(guest.config_drive, path, settings=self._settings, host=self._host)

    async def _until_running(self, instance_id: str, state: GuestState) -> GuestState:
        """Resume a paused guest, and wait until it runs. Raises HypervisorError when it ended instead."""
        if state.power_state == PowerState.RUNNING:
            return state
        with self._events.watch(instance_id) as changed:
            try:
                async with asyncio.timeout(self._settings.start_timeout_s):
                    while True:
                        changed.clear()
                        state = await self._connection.run(lambda connection: domains.resume(connection, instance_id))
                        if state.power_state == PowerState.RUNNING:
                            return state
                        if state.domain_id is None:
                            raise HypervisorError(reason="the guest ended while it was started")
                        await changed.wait()
            except TimeoutError as error:
                limit = self._settings.start_timeout_s
                raise HypervisorError(reason=f"the guest did not run within {limit:g} seconds") from error

    async def _shut_down(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> GuestState:
        """Press the power button until the guest no longer runs as `was_domain_id`, or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        with self._events.watch(instance_id) as changed:
            state = await self.observe(instance_id)
            press_at = loop.time()
            while state.domain_id == was_domain_id and loop.time() < deadline:
                if loop.time() >= press_at:
                    await self._connection.run(lambda connection: domains.press_power_button(connection, instance_id))
                    press_at = loop.time() + self._settings.acpi_retry_s
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(deadline, press_at)):
                        await changed.wait()
                changed.clear()
                state = await self.observe(instance_id)
        return state

    async def _restore_disk(self, instance_id: str, disk: DiskDefinition) -> None:
        """A disk or a base image that somebody removed is made again; what exists is kept."""
        if disk.image is not None:
            await self._images.ensure(disk.image)
        path = self._paths.disk(instance_id, disk.name)
        if not await asyncio.to_thread(path.exists):
            log.warning("disk.missing", instance=instance_id, disk=disk.name)
            await self._ensure_disk(instance_id, disk)

    def _domain_files(self, guest: GuestDefinition) -> DomainFiles:
        """Blocking. Raises HypervisorError when a disk is missing."""
        instance_id = guest.instance_id
        files = tuple(self._paths.disk(instance_id, disk.name) for disk in guest.disks)
        for disk, path in zip(guest.disks, files, strict=True):
            if not path.exists():
                raise HypervisorError(reason=f"disk {disk.name} of the instance does not exist")
        directory = self._paths.instance(instance_id)
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        ownership.keep(directory, self._host)
        console_log = self._paths.console_log(instance_id)
        console.bound(console_log, self._settings)
        return DomainFiles(
            disks=files,
            console_log=console_log,
            console_socket=self._paths.socket(instance_id, CONSOLE_SOCKETS[ConsoleKind.SERIAL]),
            vnc_socket=self._paths.socket(instance_id, CONSOLE_SOCKETS[ConsoleKind.VNC]),
            config_drive=self._paths.config_drive(instance_id) if guest.config_drive is not None else None,
        )
