"""The hypervisor contract on libvirt: guests of one host as QEMU domains. The agent opens it and calls nothing else.

Where things are: connection.py (calls, deadlines, reconnect), domains.py (what is done with a domain), domain_xml.py (its
definition), power.py (starts and ends), disks.py and image_cache.py (files), console.py (logs and consoles), host_survey.py
(inventory and census), guest_events.py (what libvirt tells by itself).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from instar.errors import HypervisorError
from instar.hypervisor.contract import HostNetwork, Report
from instar.hypervisor.libvirt import acceleration, domains, memory, questions, set_aside
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.console import GuestConsoles
from instar.hypervisor.libvirt.devices import GuestDevices
from instar.hypervisor.libvirt.disk_moves import DiskMoves
from instar.hypervisor.libvirt.disk_offer import offer_aside, offer_running, stream_name
from instar.hypervisor.libvirt.disks import InstanceDisks, supports_direct_io
from instar.hypervisor.libvirt.domain_xml import HostFacts
from instar.hypervisor.libvirt.guest_events import GuestEvents
from instar.hypervisor.libvirt.host_paths import FULL, HostPaths, disk_full
from instar.hypervisor.libvirt.host_survey import HostSurvey
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.hypervisor.libvirt.io_errors import IoErrors, is_io_error
from instar.hypervisor.libvirt.live_migration import LiveMigrations
from instar.hypervisor.libvirt.live_target import LiveTargets, MigrationSockets, socket_name
from instar.hypervisor.libvirt.power import GuestPower
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.libvirt.snapshots import Snapshots
from instar.hypervisor.libvirt.volume_reach import VolumeReach
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
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk

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
        self._host, self._network = host, network
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
        self._power = GuestPower(
            self._connection,
            self._events,
            self._paths,
            self._images,
            network,
            ensure_disk=self.ensure_disk,
            settings=self._settings,
            host=host,
        )
        self._survey = HostSurvey(
            self._connection,
            self._paths,
            self._images,
            network,
            host=host,
            host_ip=host_ip,
            machine_shares=machine_shares,
        )
        self._consoles = GuestConsoles(self._paths, streams, observe=self.observe, settings=self._settings)
        self._devices = GuestDevices(
            self._connection, self._events, settings=self._settings, bridge_name=network.bridge_name
        )
        self._reach = VolumeReach(self._paths)
        self._volume_swap = VolumeSwap(self._connection, self._reach, settings=self._settings)
        self._snapshots = Snapshots(self._connection, self._paths, settings=self._settings, host=host)
        self._io_errors = IoErrors(self._connection, self._paths)
        self._facts = HostFacts(cloud_id=self._paths.cloud_id, virt_type="qemu", direct_io=False)

    # --- the host -----------------------------------------------------------------------------------------------------

    async def open(self, on_event: Callable[[GuestEvent], None]) -> None:
        direct_io = await asyncio.to_thread(self._prepare_directories)
        virt_type = self._settings.virt_type
        if virt_type == "auto":
            virt_type = await acceleration.virt_type()
        self._facts = HostFacts(cloud_id=self._paths.cloud_id, virt_type=virt_type, direct_io=direct_io)
        await self._images.open()
        await self._network.open()
        await self._reach.open()
        self._events.open(on_event)
        await self._connection.open()
        self._consoles.open()

    async def close(self) -> None:
        await self._consoles.close()
        await self._io_errors.close()
        await self._connection.close()
        await self._events.close()
        await self._images.close()
        await self._reach.close()
        await self._network.close()

    async def inventory(self) -> HostInventory:
        return await self._survey.inventory(self._facts.virt_type)

    async def observe(self, instance_id: str) -> GuestState:
        return await self._power.observe(instance_id)

    async def census(self) -> HostCensus:
        return await self._survey.census()

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
        await self._power.must_be_off(instance_id)
        await self._disks.ensure_none(instance_id)

    async def ensure_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        await self._network.ensure_ports(instance_id, ports)

    async def ensure_no_ports(self, instance_id: str) -> None:
        await self._network.ensure_no_ports(instance_id)

    # --- power --------------------------------------------------------------------------------------------------------

    async def ensure_running(self, guest: GuestDefinition) -> GuestState:
        return await self._power.ensure_running(await self._reach.from_here(guest), self._facts)

    async def ensure_restarted(self, guest: GuestDefinition, *, was_domain_id: int | None) -> GuestState:
        guest = await self._reach.from_here(guest)
        return await self._power.ensure_restarted(guest, self._facts, was_domain_id=was_domain_id)

    async def ensure_stopped(self, instance_id: str, *, grace_s: float) -> GuestState:
        return await self._power.ensure_stopped(instance_id, grace_s=grace_s)

    async def await_soft_reboot(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        return await self._power.await_soft_reboot(instance_id, was_domain_id=was_domain_id, wait_s=wait_s)

    async def ensure_absent(self, instance_id: str, *, keep_disks: bool) -> None:
        self._paths.instance(instance_id)
        await self._power.destroy(instance_id)
        self._take_back_offers(instance_id)
        await side_by_side(
            self._power.undefine(instance_id),
            self._network.ensure_no_ports(instance_id),
            self._let_go(instance_id),
            *(() if keep_disks else (self._disks.ensure_none(instance_id),)),
        )

    async def _let_go(self, instance_id: str) -> None:
        """No relay to a volume, no socket of a migration is left of a guest that is off."""
        await self._reach.let_go(instance_id)
        await asyncio.to_thread(self._sockets.remove, instance_id)

    # --- memory -------------------------------------------------------------------------------------------------------

    async def ensure_paused(self, instance_id: str) -> GuestState:
        return await self._connection.run(lambda connection: memory.pause(connection, instance_id))

    async def ensure_suspended(self, instance_id: str) -> GuestState:
        limit_s = self._settings.memory_timeout_s
        return await self._connection.run(lambda connection: memory.save(connection, instance_id), timeout_s=limit_s)

    # --- disks --------------------------------------------------------------------------------------------------------

    async def ensure_disk_size(self, instance_id: str, disk: DiskDefinition) -> None:
        await self._power.must_be_off(instance_id)
        await self.ensure_disk(instance_id, disk)
        await self._disks.ensure_size(instance_id, disk)

    async def ensure_no_disk(self, instance_id: str, name: str) -> None:
        path = self._paths.disk(instance_id, name)
        await self._connection.run(lambda connection: domains.refuse_disk_in_use(connection, instance_id, path))
        await self._disks.ensure_no_disk(instance_id, name)

    async def ensure_disk_kept(self, instance_id: str, name: str) -> None:
        await self._power.must_be_off(instance_id)
        await self._disks.ensure_kept(instance_id, name)

    async def ensure_disk_restored(self, instance_id: str, name: str) -> None:
        await self._power.must_be_off(instance_id)
        await self._disks.ensure_restored(instance_id, name)

    async def take_snapshot(self, instance_id: str, disk: str, target: SnapshotTarget, report: Report) -> SnapshotTaken:
        return await self._snapshots.take(instance_id, disk, target, report)

    # --- moves --------------------------------------------------------------------------------------------------------

    async def stream_address(self) -> StreamAddress:
        return self._given_out().address

    async def ensure_set_aside(self, instance_id: str) -> None:
        if await asyncio.to_thread(set_aside.is_aside, self._paths, instance_id, self._host):
            return  # what is in its place by now is what was received since
        await self._power.must_be_off(instance_id)
        await side_by_side(
            self._power.undefine(instance_id),
            self._network.ensure_no_ports(instance_id),
            self._reach.let_go(instance_id),
        )
        await asyncio.to_thread(set_aside.set_aside, self._paths, instance_id, self._host)

    async def offer_disks(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        if not await asyncio.to_thread(set_aside.is_aside, self._paths, instance_id, self._host):
            raise HypervisorError(reason="no disks of the instance are set aside")
        return await asyncio.to_thread(offer_aside, self._paths, instance_id, self._given_out(), to)

    async def receive_disks(self, instance_id: str, offer: DiskOffer, report: Report) -> None:
        await self._power.must_be_off(instance_id)
        await self._moves.receive(instance_id, offer, report)

    async def ensure_brought_back(self, instance_id: str) -> None:
        if not await asyncio.to_thread(set_aside.is_aside, self._paths, instance_id, self._host):
            return
        await self._power.must_be_off(instance_id)
        await self._power.undefine(instance_id)
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
            await self._power.destroy(instance_id)
            await self._power.undefine(instance_id)
        if guest.ports:
            await self._network.ensure_ports(instance_id, guest.ports)
        guest = await self._reach.from_here(guest)
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
        volumes = [
            await self._reach.volume_from_here(guest.instance_id, volume) if volume.volume_id == volume_id else volume
            for volume in guest.volumes
        ]
        await self._devices.ensure_volume_attached(msgspec.structs.replace(guest, volumes=tuple(volumes)), volume_id)

    async def ensure_volume_detached(self, instance_id: str, volume_id: str) -> None:
        await self._devices.ensure_volume_detached(instance_id, volume_id)
        await self._reach.let_go(instance_id, volume_id)

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

    async def has_guest_agent(self, instance_id: str) -> bool:
        return await self._connection.run(lambda connection: questions.has_guest_agent(connection, instance_id))

    async def diagnostics(self, instance_id: str) -> GuestDiagnostics:
        virt_type = self._facts.virt_type
        return await self._connection.run(
            lambda connection: questions.diagnostics(connection, instance_id, virt_type=virt_type)
        )

    async def console_output(self, instance_id: str, *, length_bytes: int) -> bytes:
        return await self._consoles.read(instance_id, length_bytes=length_bytes)

    async def offer_console(self, instance_id: str, kind: ConsoleKind, to: StreamAddress | None) -> ConsoleOffer:
        return await self._consoles.offer(instance_id, kind, to)

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
        if is_io_error(event, detail):
            self._io_errors.noticed(instance_id)
        else:
            self._events.received(instance_id, event, detail)

    async def _connected(self) -> None:
        self._survey.forget()
        dirs = frozenset(await asyncio.to_thread(self._paths.instance_ids))
        cloud_id = self._facts.cloud_id
        states = await self._connection.run(lambda connection: domains.list_ours(connection, cloud_id, dirs))
        await self._io_errors.look(states)
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


async def side_by_side(*work: Awaitable[None]) -> None:
    """All of it at the same time; returns when all has ended, and raises what the first that failed has raised."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
