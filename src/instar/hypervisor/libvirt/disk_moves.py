"""The disks of an instance come here: from another host as a stream, or by links where both see the same storage.

The driver calls it. A disk appears under its name when all that it stands on is there, so a call that ended anywhere is
taken up by the next. What the directory was made from is written in it (`ownership.py`): disks of an earlier attempt,
which may be old by now, are never taken for those that are offered.

By links nothing is copied: what was the disk becomes a layer below an empty new one, as a hard link. So what is aside stays
as it was, the new disk needs it no longer once it is removed, and both take no more room than what is written from now on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import structlog

from instar.errors import HypervisorError, StreamBroken
from instar.file_sync import sync_path
from instar.hypervisor.contract import Report
from instar.hypervisor.libvirt import ownership
from instar.hypervisor.libvirt.disk_offer import (
    backing_name,
    base_name,
    chain_of,
    check_offer,
    disks_among,
    files_of,
    next_layer,
    stands_right,
    stream_name,
)
from instar.hypervisor.libvirt.disks import InstanceDisks, make_directory
from instar.hypervisor.libvirt.host_command import run_copy, run_limited
from instar.hypervisor.libvirt.host_paths import FULL, HostPaths, disk_full
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.stream_peers import StreamFetches
from instar.model.guest import DiskFile, DiskOffer, WorkProgress

LAYERS_MAX = 4  # of a disk; each costs a look at every read of what was never written

log = structlog.get_logger()


class DiskMoves:
    """The receiving side, of one state directory."""

    def __init__(
        self,
        paths: HostPaths,
        images: ImageCache,
        disks: InstanceDisks,
        fetches: StreamFetches | None,
        *,
        settings: LibvirtSettings,
        host: str,
    ) -> None:
        self._paths, self._images, self._disks, self._fetches = paths, images, disks, fetches
        self._settings, self._host = settings, host

    async def receive(self, instance_id: str, offer: DiskOffer, report: Report) -> None:
        """See the contract. The guest is off here."""
        check_offer(offer, instance_id)
        shared = await asyncio.to_thread(self.sees, offer)
        await self.begin(instance_id, offer, shared=shared)
        async with contextlib.AsyncExitStack() as held:
            await self.hold_bases(held, offer)
            if not await asyncio.to_thread(self._has, instance_id, disks_among(offer.disks)):
                tell = _Progress(instance_id, offer.disks, report)
                await self.ensure_bases(instance_id, offer)
                if shared and await asyncio.to_thread(self._can_be_linked, offer):
                    await self._link_all(instance_id, offer)
                else:
                    await self.fetch_files(instance_id, offer, offer.disks, tell)
                    await self.fetch_others(instance_id, offer)
        report(WorkProgress(instance_id, 100))

    def sees(self, offer: DiskOffer) -> bool:
        """The disks are on storage that this host has too. Blocking."""
        return (self._paths.instances / offer.marker).is_file()

    async def begin(self, instance_id: str, offer: DiskOffer, *, shared: bool = False) -> None:
        """The directory is here for this offer: what an earlier one left is gone. Raises HypervisorError where that is not
        this host's to remove."""
        try:
            await asyncio.to_thread(self._begin, self._paths.instance(instance_id), offer.marker, shared)
        except OSError as error:
            await self._complain(error, "the directory of the instance cannot be made")

    def _begin(self, directory: Path, marker: str, shared: bool) -> None:
        owner = ownership.owner_of(directory)
        if directory.is_dir() and (owner is None or owner.received != marker):
            if ownership.is_in_use(directory) or not (ownership.is_owned_by(directory, self._host) or shared):
                # Storage that is shared after all, where this host could not see the offer's mark.
                raise HypervisorError(reason="the instance's directory belongs to another host")
            log.warning("disks.of_another_offer", instance=directory.name)
            shutil.rmtree(directory)
            owner = None
        if owner is None or owner.host != self._host:
            make_directory(directory)
            ownership.write_owner(directory, ownership.Ownership(self._host, received=marker))

    def _has(self, instance_id: str, files: tuple[DiskFile, ...]) -> bool:
        return all(self._paths.disk(instance_id, file.name).exists() for file in files)

    # --- base images ----------------------------------------------------------------------------------------------------

    async def hold_bases(self, held: contextlib.AsyncExitStack, offer: DiskOffer) -> None:
        for sha256 in {file.base_sha256 for file in offer.disks if file.base_sha256 is not None}:
            await held.enter_async_context(self._images.hold(sha256))

    async def ensure_bases(self, instance_id: str, offer: DiskOffer) -> None:
        """The images that the disks stand on are in the cache. They may be deleted everywhere else by now."""
        formats = {file.base_sha256: file.base_format for file in offer.disks if file.base_sha256 is not None}
        for sha256, image_format in formats.items():
            name = stream_name(instance_id, base_name(sha256))

            async def fetch(part: Path, name: str = name) -> None:
                await self._fetch(offer, name, part, lambda _done, _size: None)

            await self._images.ensure_from(sha256, image_format, fetch)

    # --- by streams -----------------------------------------------------------------------------------------------------

    async def fetch_files(
        self, instance_id: str, offer: DiskOffer, files: tuple[DiskFile, ...], tell: _Progress
    ) -> None:
        """These files of the offer, in its order: what others stand on comes first."""
        await asyncio.to_thread(self._check_room, instance_id, files)
        for file in files:
            path = self._paths.disk(instance_id, file.name)
            if not await asyncio.to_thread(path.exists):
                part = path.with_name(f".{path.name}.fetched")
                if not await asyncio.to_thread(part.exists):
                    await self._fetch(offer, stream_name(instance_id, file.name), part, tell.of(file))
                await self._stand_right(part, file)
                await asyncio.to_thread(self._disks.publish, part, path)
                await asyncio.to_thread(sync_path, path.parent)
            tell.of(file)(1, 1)

    async def fetch_others(self, instance_id: str, offer: DiskOffer) -> None:
        """The console's log, and what else is small and the guest's."""
        directory = self._paths.instance(instance_id)
        for name in offer.other_files:
            if not await asyncio.to_thread((directory / name).exists):
                await self._fetch(offer, stream_name(instance_id, name), directory / name, lambda _done, _size: None)

    async def _fetch(self, offer: DiskOffer, name: str, target: Path, tell: Callable[[int, int], None]) -> None:
        """Raises StreamBroken, also when nothing has come for long."""
        if self._fetches is None:
            raise HypervisorError(reason="this host takes no streams of others")
        idle_s, loop = self._settings.transfer_idle_s, asyncio.get_running_loop()

        def progress(done_bytes: int, size_bytes: int) -> None:
            if not idle.expired():
                idle.reschedule(loop.time() + idle_s)
            tell(done_bytes, size_bytes)

        try:
            async with asyncio.timeout(idle_s) as idle:
                await self._fetches.fetch_file(
                    offer.source, name, target, progress=progress, deadline_s=self._settings.copy_timeout_s
                )
        except TimeoutError as error:
            reason = f"nothing has come for {idle_s:g} seconds"
            raise StreamBroken(what=name, host=offer.source.host, reason=reason) from error

    async def _stand_right(self, part: Path, file: DiskFile) -> None:
        """The fetched file names what is below it where that is on this host."""
        base = self._paths.image(file.base_sha256) if file.base_sha256 is not None else None
        if await asyncio.to_thread(stands_right, part, file, base):
            return
        below = [str(base), "-F", file.base_format] if base is not None else [backing_name(file)]
        below += ["-F", "qcow2"] if file.below else []
        command = ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", *below, str(part)]
        await run_limited(command, settings=self._settings, host=self._host, writes_to=part)

    def _check_room(self, instance_id: str, files: tuple[DiskFile, ...]) -> None:
        """Blocking. Raises DiskFull before anything is sent in vain."""
        directory = self._paths.instance(instance_id)
        needed = sum(file.size_bytes for file in files if not self._paths.disk(instance_id, file.name).exists())
        there = sum(path.stat().st_blocks * 512 for path in directory.glob(".*.qcow2.*") if path.is_file())
        room = os.statvfs(directory)
        if room.f_bavail * room.f_frsize + there < needed + (self._settings.disk_reserved_mib << 20):
            raise disk_full(directory, self._host)

    # --- by links -------------------------------------------------------------------------------------------------------

    def _can_be_linked(self, offer: DiskOffer) -> bool:
        """What the files stand on is found on this host as they name it. Blocking."""
        directory = (self._paths.instances / offer.marker).parent
        for file in offer.disks:
            base = self._paths.image(file.base_sha256) if file.base_sha256 is not None else None
            if not stands_right(directory / f"{file.name}.qcow2", file, base):
                return False
        return True

    async def _link_all(self, instance_id: str, offer: DiskOffer) -> None:
        aside, directory = (self._paths.instances / offer.marker).parent, self._paths.instance(instance_id)
        try:
            await asyncio.to_thread(_copy_others, aside, directory, offer.other_files)
            for disk in disks_among(offer.disks):
                path = self._paths.disk(instance_id, disk.name)
                if not await asyncio.to_thread(path.exists):
                    await self._link(offer.disks, disk, aside, path)
            await asyncio.to_thread(_remove_unused, self._paths, directory)
        except OSError as error:
            await self._complain(error, "the disks cannot be linked")

    async def _link(self, files: tuple[DiskFile, ...], disk: DiskFile, aside: Path, path: Path) -> None:
        chain, layer = chain_of(files, disk.name), next_layer(files, disk.name)
        names = {file.name: file.name for file in chain[1:]} | {disk.name: layer}
        await asyncio.to_thread(_link_files, aside, path.parent, names)
        if len(chain) <= LAYERS_MAX:
            await self._disks.create(path, disk.virtual_size_bytes, (f"{layer}.qcow2", "qcow2"))
            return
        part = path.with_name(f".{path.name}.flat")
        try:
            await self._disks.create(part, disk.virtual_size_bytes, (f"{layer}.qcow2", "qcow2"))
            await self._flatten(part, chain[-1])
            await asyncio.to_thread(self._disks.publish, part, path)
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)

    async def _flatten(self, part: Path, lowest: DiskFile) -> None:
        """The file has itself what the layers below it have, and stands on the image alone."""
        below = [""]
        if lowest.base_sha256 is not None:
            below = [str(self._paths.image(lowest.base_sha256)), "-F", lowest.base_format]
        command = ["qemu-img", "rebase", "-p", "-f", "qcow2", "-b", *below, str(part)]
        await run_copy(
            command, settings=self._settings, host=self._host, writes_to=part, on_percent=lambda _percent: None
        )

    async def _complain(self, error: OSError, reason: str) -> None:
        if error.errno in FULL:
            raise await asyncio.to_thread(disk_full, self._paths.instances, self._host) from error
        log.warning("disks.failed", error=type(error).__name__, errno=error.errno)
        raise HypervisorError(reason=reason) from error


class _Progress:
    """Percent of all files, weighed by what they hold."""

    def __init__(self, instance_id: str, files: tuple[DiskFile, ...], report: Report) -> None:
        self._instance_id, self._report = instance_id, report
        self._done = {file.name: 0.0 for file in files}
        self._weights = {file.name: max(1, file.size_bytes) for file in files}

    def of(self, file: DiskFile) -> Callable[[int, int], None]:
        def tell(done_bytes: int, size_bytes: int) -> None:
            self._done[file.name] = done_bytes / size_bytes if size_bytes else 1.0
            done = sum(self._done[name] * weight for name, weight in self._weights.items())
            self._report(WorkProgress(self._instance_id, min(99, int(100 * done / sum(self._weights.values())))))

        return tell


def tell_nobody(instance_id: str, files: tuple[DiskFile, ...]) -> _Progress:
    return _Progress(instance_id, files, lambda _progress: None)


def _link_files(aside: Path, directory: Path, names: dict[str, str]) -> None:
    for name, new_name in names.items():
        with contextlib.suppress(FileExistsError):
            os.link(aside / f"{name}.qcow2", directory / f"{new_name}.qcow2")
    sync_path(directory)


def _copy_others(aside: Path, directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (aside / name).is_file() and not (directory / name).exists():
            shutil.copyfile(aside / name, directory / name)


def _remove_unused(paths: HostPaths, directory: Path) -> None:
    """Layers that no disk stands on any more, for instance since one was made flat."""
    needed = {file.name for file in files_of(paths, directory)}
    for path in directory.glob("*below*.qcow2"):
        if path.stem not in needed:
            path.unlink()
