"""The receiving side of a live migration: everything that the guest needs is here before it comes. The driver calls it.

libvirtd of the source speaks to the one here, QEMU there to QEMU here, by unix sockets alone: the agents carry them from
host to host as streams, which are encrypted and for the one peer that they are granted to. Nothing listens on TCP for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec

from instar.hypervisor.libvirt.disk_moves import DiskMoves, tell_nobody
from instar.hypervisor.libvirt.disk_offer import backing_name, check_offer, disks_among
from instar.hypervisor.libvirt.disks import InstanceDisks
from instar.hypervisor.libvirt.domain_xml import domain_name
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.live_xml import HostNames
from instar.hypervisor.stream_peers import StreamGrants
from instar.model.guest import DiskFile, DiskOffer, GuestDefinition, LiveTarget

LIBVIRT_DIRECTORY = Path("/run/libvirt")  # as every libvirtd sees it; a private one has another directory bound there
DAEMON, MEMORY, DISKS = "daemon", "memory", "disks"
DAEMON_VALID_S = 600.0  # it is connected to at the beginning; the others when their turn has come
DATA_VALID_S = 86_400.0
NAMES = "names"  # in LiveTarget.details


class MigrationSockets:
    """Where the sockets of migrations are: as this process sees them, and as the host's libvirtd and QEMU do."""

    def __init__(self, uri: str) -> None:
        given = parse_qs(urlsplit(uri).query).get("socket")
        self.daemon = Path(given[0]) if given else LIBVIRT_DIRECTORY / "libvirt-sock"
        self._directory = self.daemon.parent / "instar"

    def path(self, instance_id: str, what: str) -> Path:
        """Blocking: its directory exists."""
        self._directory.mkdir(mode=0o711, exist_ok=True)
        return self._directory / f"{instance_id}.{what}"

    def seen_by_libvirt(self, instance_id: str, what: str) -> str:
        return str(LIBVIRT_DIRECTORY / "instar" / f"{instance_id}.{what}")

    def remove(self, instance_id: str) -> None:
        """Blocking. QEMU leaves some of what it listened on."""
        for what in (DAEMON, MEMORY, DISKS):
            (self._directory / f"{instance_id}.{what}").unlink(missing_ok=True)


def socket_name(instance_id: str, what: str) -> str:
    """The name by which a socket is granted."""
    return f"live/{instance_id}/{what}"


class LiveTargets:
    def __init__(
        self, paths: HostPaths, disks: InstanceDisks, moves: DiskMoves, sockets: MigrationSockets,
        bridge_name: Callable[[str], str],
    ) -> None:  # fmt: skip
        self._paths, self._disks, self._moves, self._sockets = paths, disks, moves, sockets
        self._bridge_name = bridge_name

    async def make_ready(
        self, guest: GuestDefinition, offer: DiskOffer, streams: StreamGrants, *, is_here: bool
    ) -> LiveTarget:
        """See the contract. `is_here`: the guest has come already, nothing of it is touched."""
        instance_id = guest.instance_id
        check_offer(offer, instance_id)
        shared = await asyncio.to_thread(self._moves.sees, offer)
        if not is_here:
            async with contextlib.AsyncExitStack() as held:
                await self._moves.hold_bases(held, offer)
                if not shared:
                    await self._moves.begin(instance_id, offer)
                await self._moves.ensure_bases(instance_id, offer)
                if not shared:
                    await self._make_files(instance_id, offer)
            await asyncio.to_thread(self._sockets.remove, instance_id)
        names = await asyncio.to_thread(self._names, guest)
        await asyncio.to_thread(self._grant, instance_id, offer, streams)
        return LiveTarget(streams.address, shared, {NAMES: msgspec.json.encode(names).decode()})

    async def _make_files(self, instance_id: str, offer: DiskOffer) -> None:
        """What the disks stand on, and empty disks. They are made anew: one that an attempt has begun to fill may hold what
        the guest has dropped since, and only what it has is copied."""
        disks = disks_among(offer.disks)
        layers = tuple(file for file in offer.disks if file not in disks)
        await self._moves.fetch_files(instance_id, offer, layers, tell_nobody(instance_id, layers))
        await self._moves.fetch_others(instance_id, offer)
        for disk in disks:
            path = self._paths.disk(instance_id, disk.name)
            await asyncio.to_thread(path.unlink, missing_ok=True)
            await self._disks.create(path, disk.virtual_size_bytes, self._below(disk))

    def _below(self, disk: DiskFile) -> tuple[str, str] | None:
        if disk.base_sha256 is not None:
            return str(self._paths.image(disk.base_sha256)), disk.base_format
        return (backing_name(disk), "qcow2") if disk.below else None

    def _names(self, guest: GuestDefinition) -> HostNames:
        return HostNames(
            directory=str(self._paths.instance(guest.instance_id)),
            sockets=str(self._paths.socket(guest.instance_id, "console.sock").parent),
            name=domain_name(guest, self._paths.cloud_id),
            cloud=self._paths.cloud_id,
            bridges={port.network.id: self._bridge_name(port.network.id) for port in guest.ports},
            volumes={volume.volume_id: volume.connection for volume in guest.volumes},
        )

    def _grant(self, instance_id: str, offer: DiskOffer, streams: StreamGrants) -> None:
        to = offer.source
        name = socket_name(instance_id, DAEMON)
        streams.grant_socket(to, name, self._sockets.daemon, valid_s=DAEMON_VALID_S)
        for what in (MEMORY, DISKS):
            path = self._sockets.path(instance_id, what)
            streams.grant_socket(to, socket_name(instance_id, what), path, valid_s=DATA_VALID_S)
