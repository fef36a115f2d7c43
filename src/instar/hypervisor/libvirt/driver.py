"""The hypervisor contract on libvirt: guests of one host as QEMU domains. The agent opens it and calls nothing else.

Where things are: connection.py (calls, deadlines, reconnect), domains.py (what is done with a domain), domain_xml.py (its
definition), disks.py and image_cache.py (files), guest_events.py (what libvirt tells by itself).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from instar.errors import ConsoleUnavailable, HypervisorError, NoRunningGuest
from instar.hypervisor.console_offer import console_name, grant_console
from instar.hypervisor.contract import HostNetwork, Report
from instar.hypervisor.libvirt import (
    acceleration,
    config_drive,
    console,
    domains,
    memory,
    ownership,
    questions,
    set_aside,
)
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.devices import GuestDevices
from instar.hypervisor.libvirt.disk_moves import DiskMoves
from instar.hypervisor.libvirt.disk_offer import offer_aside, offer_running, stream_name
from instar.hypervisor.libvirt.disks import InstanceDisks, supports_direct_io
from instar.hypervisor.libvirt.domain_xml import DomainFiles, HostFacts, domain_xml
from instar.hypervisor.libvirt.guest_events import GuestEvents
from instar.hypervisor.libvirt.host_paths import FULL, HostPaths, disk_full
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.hypervisor.libvirt.live_migration import LiveMigrations
from instar.hypervisor.libvirt.live_target import LiveTargets, MigrationSockets, socket_name
from instar.hypervisor.libvirt.questions import HostCapabilities, read_capabilities
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.libvirt.snapshots import Snapshots
from instar.hypervisor.libvirt.volume_swap import VolumeSwap
from instar.hypervisor.stream_peers import StreamFetches, StreamGrants
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
from instar.model.states import PowerState
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk

GIB = 1 << 30
CONSOLE_SOCKETS = {ConsoleKind.VNC: "vnc.sock", ConsoleKind.SERIAL: "console.sock"}
UP = frozenset({PowerState.RUNNING, PowerState.PAUSED})

log = structlog.get_logger()


class LibvirtHypervisor:
    """See contract.Hypervisor. `host` names the host in errors; everything of it lies under `state_dir`.

    `open` returns although libvirtd is away, and connects as soon as it is there: an agent must be able to start first."""

    def __init__(
        self,
        *,
        uri: str,
        host: str,
        state_dir: Path,
        network: HostNetwork,
        settings: LibvirtSettings | None = None,
        image_token: Callable[[], str] | None = None,
        host_ip: str = "127.0.0.1",
        machine_shares: int = 1,
        streams: StreamGrants | None = None,
        fetches: StreamFetches | None = None,
    ) -> None:
        """`host_ip` is where other hosts reach this one; `machine_shares` hosts divide memory and disk of the machine.
        Without `streams` the host offers no consoles and no disks, without `fetches` it gets none of other hosts."""
        self._host, self._network, self._host_ip, self._shares = host, network, host_ip, machine_shares
        self._streams = streams
        self._settings = settings or LibvirtSettings()
        self._paths = HostPaths(state_dir)
        self._connection = LibvirtConnection(
            uri=uri,
            host=host,
            state_dir=self._paths.state_dir,
            settings=self._settings,
            on_lifecycle=self._lifecycle,
            on_device_removed=self._device_removed,
            on_connected=self._connected,
            on_lost=self._lost,
        )
        self._events = GuestEvents(
            read=self.observe, is_ours=self._is_ours, waiting_max=self._settings.events_waiting_max
        )
        self._images = ImageCache(self._paths, settings=self._settings, host=host, bearer_token=image_token)
        self._disks = InstanceDisks(self._paths, settings=self._settings, host=host)
        self._moves = DiskMoves(
            self._paths, self._images, self._disks, fetches, settings=self._settings, host=host
        )
        self._sockets = MigrationSockets(uri)
        self._targets = LiveTargets(self._paths, self._disks, self._moves, self._sockets, network.bridge_name)
        self._live = LiveMigrations(
            self._connection, self._paths, self._sockets, fetches, settings=self._settings, host=host
        )
        self._devices = GuestDevices(
            self._connection, self._events, settings=self._settings, bridge_name=network.bridge_name
        )
        self._volume_swap = VolumeSwap(self._connection, settings=self._settings)
        self._snapshots = Snapshots(
            self._connection, self._paths, self._disks, settings=self._settings, host=host
        )
        self._starts = asyncio.Semaphore(self._settings.starts_max)
        self._facts = HostFacts(cloud_id=self._paths.cloud_id, virt_type="qemu", direct_io=False)
        self._capabilities: HostCapabilities | None = None
        self._sweeper: asyncio.Task[None] | None = None

    # --- the host -----------------------------------------------------------------------------------------------------

    async def open(self, on_event: Callable[[GuestEvent], None]) -> None:
        direct_io = await asyncio.to_thread(self._prepare_directories)
        virt_type = self._settings.virt_type
        if virt_type == "auto":
            virt_type = await acceleration.virt_type()
        self._facts = HostFacts(cloud_id=self._paths.cloud_id, virt_type=virt_type, direct_io=direct_io)
        await self._images.open()
        await self._network.open()
        self._events.open(on_event)
        await self._connection.open()
        self._sweeper = asyncio.create_task(console.sweep(self._paths, self._settings), name="console-sweep")

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await self._connection.close()
        await self._events.close()
        await self._images.close()
        await self._network.close()

    async def inventory(self) -> HostInventory:
        if self._capabilities is None:
            self._capabilities = await self._connection.run(read_capabilities)
        known = await asyncio.to_thread(self._paths.instance_ids)
        cloud_id = self._facts.cloud_id

        def read(connection: Any) -> tuple[list[Any], int]:
            states = domains.list_ours(connection, cloud_id, frozenset(known))
            return connection.getInfo(), sum(1 for state in states.values() if state.domain_id is not None)

        info, running = await self._connection.run(read)
        room = await asyncio.to_thread(os.statvfs, self._paths.state_dir)
        return HostInventory(
            vcpus=int(info[2]),
            memory_mib=int(info[1]) // self._shares,
            disk_gib=room.f_blocks * room.f_frsize // GIB // self._shares,
            free_disk_gib=room.f_bavail * room.f_frsize // GIB // self._shares,
            hypervisor_type="QEMU",
            hypervisor_version=self._capabilities.hypervisor_version,
            hypervisor_hostname=self._host,
            cpu_arch=self._capabilities.arch,
            cpu_model=self._capabilities.cpu_model,
            cpu_features=self._capabilities.cpu_features,
            virt_type=self._facts.virt_type,
            host_ip=self._host_ip,
            running_vms=running,
        )

    async def observe(self, instance_id: str) -> GuestState:
        return await self._connection.run(lambda connection: domains.observe(connection, instance_id))

    async def census(self) -> HostCensus:
        dirs = await asyncio.to_thread(self._paths.instance_ids)
        owned, aside = await asyncio.to_thread(self._owned_directories)
        cloud_id = self._facts.cloud_id
        guests = await self._connection.run(lambda connection: domains.list_ours(connection, cloud_id, frozenset(dirs)))
        taps, networks = await self._network.census()
        return HostCensus(
            guests=guests,
            instance_dirs=owned,
            set_aside=aside,
            taps=taps,
            networks=networks,
            with_ports=self._network.instances_with_ports(),
            cached_images=await asyncio.to_thread(self._paths.cached_images),
            damaged_images=self._images.damaged(),
        )

    # --- images, disks, ports -----------------------------------------------------------------------------------------

    async def ensure_image(self, image: ImageSource) -> None:
        await self._images.ensure(image)

    async def ensure_disk(self, instance_id: str, disk: DiskDefinition) -> None:
        if disk.image is None:
            await self._disks.ensure(instance_id, disk)
            return
        async with self._images.hold(disk.image.sha256):
            await self._disks.ensure(instance_id, disk)

    async def ensure_no_disks(self, instance_id: str) -> None:
        await self._must_be_off(instance_id)
        await self._disks.ensure_none(instance_id)

    async def ensure_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        await self._network.ensure_ports(instance_id, ports)

    async def ensure_no_ports(self, instance_id: str) -> None:
        await self._network.ensure_no_ports(instance_id)

    # --- power --------------------------------------------------------------------------------------------------------

    async def ensure_running(self, guest: GuestDefinition) -> GuestState:
        state = await self.observe(guest.instance_id)
        if state.domain_id is None:
            state = await self._start(guest)
        return await self._until_running(guest.instance_id, state)

    async def ensure_restarted(self, guest: GuestDefinition, *, was_domain_id: int | None) -> GuestState:
        instance_id = guest.instance_id
        state = await self.observe(instance_id)
        if state.domain_id is not None and state.domain_id != was_domain_id:
            return await self._until_running(instance_id, state)
        await self._destroy(instance_id)
        await self._connection.run(lambda connection: domains.undefine(connection, instance_id))
        await self._network.ensure_ports(instance_id, guest.ports)
        for disk in guest.disks:
            await self._restore_disk(instance_id, disk)
        state = await self._start(guest)
        if state.domain_id == was_domain_id:
            # A daemon that was restarted counts its ids from one again. The caller must see another one.
            await self._destroy(instance_id)
            state = await self._start(guest)
        return await self._until_running(instance_id, state)

    async def ensure_stopped(self, instance_id: str, *, grace_s: float) -> GuestState:
        state = await self.observe(instance_id)
        # A paused guest cannot hear the button.
        if state.domain_id is not None and state.power_state == PowerState.RUNNING and grace_s > 0:
            state = await self._shut_down(instance_id, was_domain_id=state.domain_id, wait_s=grace_s)
        if state.domain_id is None:
            return state
        return await self._destroy(instance_id)

    async def await_soft_reboot(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        state = await self._shut_down(instance_id, was_domain_id=was_domain_id, wait_s=wait_s)
        if state.domain_id is None:
            return SoftRebootOutcome(outcome="shut_down", state=state)
        outcome = "timed_out" if state.domain_id == was_domain_id else "restarted"
        return SoftRebootOutcome(outcome=outcome, state=state)

    async def ensure_absent(self, instance_id: str, *, keep_disks: bool) -> None:
        self._paths.instance(instance_id)
        await self._destroy(instance_id)
        await self._connection.run(lambda connection: domains.undefine(connection, instance_id))
        await self._network.ensure_no_ports(instance_id)
        self._take_back_offers(instance_id)
        await asyncio.to_thread(self._sockets.remove, instance_id)
        if not keep_disks:
            await self._disks.ensure_none(instance_id)

    # --- memory -------------------------------------------------------------------------------------------------------

    async def ensure_paused(self, instance_id: str) -> GuestState:
        return await self._connection.run(lambda connection: memory.pause(connection, instance_id))

    async def ensure_suspended(self, instance_id: str) -> GuestState:
        limit_s = self._settings.memory_timeout_s
        return await self._connection.run(lambda connection: memory.save(connection, instance_id), timeout_s=limit_s)

    # --- disks --------------------------------------------------------------------------------------------------------

    async def ensure_disk_size(self, instance_id: str, disk: DiskDefinition) -> None:
        await self._must_be_off(instance_id)
        await self.ensure_disk(instance_id, disk)
        await self._disks.ensure_size(instance_id, disk)

    async def ensure_no_disk(self, instance_id: str, name: str) -> None:
        path = self._paths.disk(instance_id, name)
        await self._connection.run(lambda connection: domains.refuse_disk_in_use(connection, instance_id, path))
        await self._disks.ensure_no_disk(instance_id, name)

    async def ensure_disk_kept(self, instance_id: str, name: str) -> None:
        await self._must_be_off(instance_id)
        await self._disks.ensure_kept(instance_id, name)

    async def ensure_disk_restored(self, instance_id: str, name: str) -> None:
        await self._must_be_off(instance_id)
        await self._disks.ensure_restored(instance_id, name)

    async def take_snapshot(self, instance_id: str, disk: str, target: SnapshotTarget, report: Report) -> SnapshotTaken:
        return await self._snapshots.take(instance_id, disk, target, report)

    # --- moves --------------------------------------------------------------------------------------------------------

    async def stream_address(self) -> StreamAddress:
        return self._given_out().address

    async def ensure_set_aside(self, instance_id: str) -> None:
        if await asyncio.to_thread(set_aside.is_aside, self._paths, instance_id, self._host):
            return  # what is in its place by now is what was received since
        await self._must_be_off(instance_id)
        await self._connection.run(lambda connection: domains.undefine(connection, instance_id))
        await self._network.ensure_no_ports(instance_id)
        await asyncio.to_thread(set_aside.set_aside, self._paths, instance_id, self._host)

    async def offer_disks(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        if not await asyncio.to_thread(set_aside.is_aside, self._paths, instance_id, self._host):
            raise HypervisorError(reason="no disks of the instance are set aside")
        return await asyncio.to_thread(offer_aside, self._paths, instance_id, self._given_out(), to)

    async def receive_disks(self, instance_id: str, offer: DiskOffer, report: Report) -> None:
        await self._must_be_off(instance_id)
        await self._moves.receive(instance_id, offer, report)

    async def ensure_brought_back(self, instance_id: str) -> None:
        if not await asyncio.to_thread(set_aside.is_aside, self._paths, instance_id, self._host):
            return
        await self._must_be_off(instance_id)
        await self._connection.run(lambda connection: domains.undefine(connection, instance_id))
        self._take_back_offers(instance_id)
        await asyncio.to_thread(set_aside.bring_back, self._paths, instance_id, self._host)

    async def ensure_nothing_aside(self, instance_id: str) -> None:
        self._take_back_offers(instance_id)
        await asyncio.to_thread(set_aside.forget_aside, self._paths, instance_id, self._host)

    async def offer_live(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        if (await self.observe(instance_id)).domain_id is None:
            raise HypervisorError(reason="the guest does not run")
        return await asyncio.to_thread(offer_running, self._paths, instance_id, self._given_out(), to)

    async def ensure_ready_for_live(self, guest: GuestDefinition, offer: DiskOffer) -> LiveTarget:
        instance_id = guest.instance_id
        is_here = (await self.observe(instance_id)).domain_id is not None
        if not is_here:  # what an attempt before this one has left would be in the way
            await self._destroy(instance_id)
            await self._connection.run(lambda connection: domains.undefine(connection, instance_id))
        if guest.ports:
            await self._network.ensure_ports(instance_id, guest.ports)
        return await self._targets.make_ready(guest, offer, self._given_out(), is_here=is_here)

    async def migrate_live(
        self, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, report: Report
    ) -> None:
        await self._live.migrate(guest, target, options, report)

    async def abort_live(self, instance_id: str) -> None:
        await self._live.abort(instance_id)

    async def force_live(self, instance_id: str) -> None:
        await self._live.force(instance_id)

    def _given_out(self) -> StreamGrants:
        if self._streams is None:
            raise HypervisorError(reason="this host gives nothing to other hosts")
        return self._streams

    def _take_back_offers(self, instance_id: str) -> None:
        if self._streams is not None:
            self._streams.revoke(stream_name(instance_id, ""))
            self._streams.revoke(socket_name(instance_id, ""))

    # --- devices ------------------------------------------------------------------------------------------------------

    async def ensure_port_plugged(self, guest: GuestDefinition, port_id: str) -> None:
        await self._devices.ensure_port_plugged(guest, port_id)

    async def ensure_port_unplugged(self, instance_id: str, port_id: str) -> None:
        await self._devices.ensure_port_unplugged(instance_id, port_id)

    async def ensure_volume_attached(self, guest: GuestDefinition, volume_id: str) -> None:
        await self._devices.ensure_volume_attached(guest, volume_id)

    async def ensure_volume_detached(self, instance_id: str, volume_id: str) -> None:
        await self._devices.ensure_volume_detached(instance_id, volume_id)

    async def swap_volume(self, instance_id: str, old_volume_id: str, new: VolumeDisk, report: Report) -> None:
        await self._volume_swap.swap(instance_id, old_volume_id, new, report)

    # --- questions ----------------------------------------------------------------------------------------------------

    async def set_password(self, instance_id: str, user: str, password: str) -> None:
        limit_s = self._settings.agent_timeout_s
        await self._connection.run(
            lambda connection: questions.set_password(
                connection, instance_id, user, password, agent_timeout_s=limit_s
            ),
            timeout_s=limit_s + self._settings.call_timeout_s,
        )

    async def diagnostics(self, instance_id: str) -> GuestDiagnostics:
        virt_type = self._facts.virt_type
        return await self._connection.run(
            lambda connection: questions.diagnostics(connection, instance_id, virt_type=virt_type)
        )

    async def console_output(self, instance_id: str, *, length_bytes: int) -> bytes:
        length = min(length_bytes, self._settings.console_read_max_bytes)
        return await asyncio.to_thread(console.read_tail, self._paths.console_log(instance_id), length)

    async def offer_console(self, instance_id: str, kind: ConsoleKind, to: StreamAddress | None) -> ConsoleOffer:
        if self._streams is None:
            raise ConsoleUnavailable(kind=kind.value)
        if (await self.observe(instance_id)).domain_id is None:
            raise NoRunningGuest(id=instance_id)
        if to is None:
            return ConsoleOffer(self._streams.address, console_name(instance_id, kind))
        path = await asyncio.to_thread(self._paths.socket, instance_id, CONSOLE_SOCKETS[kind])
        return grant_console(self._streams, instance_id, kind, path, to)

    # --- how ----------------------------------------------------------------------------------------------------------

    async def _must_be_off(self, instance_id: str) -> None:
        self._paths.instance(instance_id)
        if (await self.observe(instance_id)).domain_id is not None:
            raise HypervisorError(reason="the guest still runs, its disks are left alone")

    async def _start(self, guest: GuestDefinition) -> GuestState:
        """Define and start the guest, or let it go on from its saved memory. In the first case its config drive is
        written anew, for what it says may have changed; a guest with a memory still knows the old one."""
        saved = await self._connection.run(
            lambda connection: memory.is_saved(domains.find(connection, guest.instance_id))
        )
        if guest.config_drive is not None and not saved:
            await config_drive.write_config_drive(
                guest.config_drive,
                self._paths.config_drive(guest.instance_id),
                settings=self._settings,
                host=self._host,
            )
        files = await asyncio.to_thread(self._domain_files, guest)
        await asyncio.to_thread(ownership.keep, self._paths.instance(guest.instance_id), self._host)
        xml = domain_xml(guest, files, self._facts, settings=self._settings, bridge_name=self._network.bridge_name)
        self._events.expect(guest.instance_id)
        begin = memory.bring_back if saved else domains.start
        limit_s = self._settings.memory_timeout_s if saved else self._settings.start_timeout_s
        async with self._starts:
            return await self._connection.run(
                lambda connection: begin(connection, guest.instance_id, xml), timeout_s=limit_s
            )

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

    async def _destroy(self, instance_id: str) -> GuestState:
        return await self._connection.run(
            lambda connection: domains.destroy(connection, instance_id), timeout_s=self._settings.destroy_timeout_s
        )

    async def _restore_disk(self, instance_id: str, disk: DiskDefinition) -> None:
        """A disk or a base image that somebody removed is made again; what exists is kept."""
        if disk.image is not None:
            await self._images.ensure(disk.image)
        path = self._paths.disk(instance_id, disk.name)
        if not await asyncio.to_thread(path.exists):
            log.warning("disk.missing", instance=instance_id, disk=disk.name)
            await self.ensure_disk(instance_id, disk)

    def _domain_files(self, guest: GuestDefinition) -> DomainFiles:
        """Blocking. Raises HypervisorError when a disk is missing."""
        instance_id = guest.instance_id
        files = tuple(self._paths.disk(instance_id, disk.name) for disk in guest.disks)
        for disk, path in zip(guest.disks, files, strict=True):
            if not path.exists():
                raise HypervisorError(reason=f"disk {disk.name} of the instance does not exist")
        self._paths.instance(instance_id).mkdir(mode=0o711, parents=True, exist_ok=True)
        console_log = self._paths.console_log(instance_id)
        console.bound(console_log, self._settings)
        return DomainFiles(
            disks=files,
            console_log=console_log,
            console_socket=self._paths.socket(instance_id, CONSOLE_SOCKETS[ConsoleKind.SERIAL]),
            vnc_socket=self._paths.socket(instance_id, CONSOLE_SOCKETS[ConsoleKind.VNC]),
            config_drive=self._paths.config_drive(instance_id) if guest.config_drive is not None else None,
        )

    def _owned_directories(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Instances with a directory of this host, and those with something aside. Blocking."""
        paths, host = self._paths, self._host
        owned = (name for name in paths.instance_ids() if ownership.is_owned_by(paths.instance(name), host))
        return tuple(owned), tuple(name for name in paths.aside_ids() if set_aside.is_aside(paths, name, host))

    def _prepare_directories(self) -> bool:
        """Blocking. True when disks may bypass the host's page cache."""
        try:
            for directory in (self._paths.cache, self._paths.instances):
                directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(self._paths.state_dir, self._host) from error
            raise
        return supports_direct_io(self._paths.instances)

    # --- what libvirt tells -------------------------------------------------------------------------------------------

    def _lifecycle(self, instance_id: str, event: int, detail: int) -> None:
        self._events.received(instance_id, event, detail)

    async def _connected(self) -> None:
        self._capabilities = None  # it may be another version that came back
        dirs = frozenset(await asyncio.to_thread(self._paths.instance_ids))
        cloud_id = self._facts.cloud_id
        states = await self._connection.run(lambda connection: domains.list_ours(connection, cloud_id, dirs))
        self._events.compare(states)
        self._events.wake_all()
        log.info("libvirt.connected", host=self._host, guests=len(states))

    def _device_removed(self, instance_id: str) -> None:
        self._events.wake(instance_id)

    def _lost(self) -> None:
        self._events.wake_all()

    async def _is_ours(self, instance_id: str) -> bool:
        cloud_id = self._facts.cloud_id

        def look(connection: Any) -> bool:
            domain = domains.find(connection, instance_id)
            return domain is not None and domains.is_ours(domain, cloud_id)

        return await self._connection.run(look)
