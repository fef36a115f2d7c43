"""Images, disks and snapshots of one simulated host. Called by the driver."""

from __future__ import annotations

import asyncio
import errno
import re
import tempfile
import threading
from pathlib import Path

import msgspec

from instar.config import SimulatedSettings
from instar.errors import DiskFull, HypervisorError, ImageGone
from instar.hypervisor.contract import Report
from instar.hypervisor.image_transfer import send
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.image_check import ImageCheck, file_of
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.progress import take_time
from instar.hypervisor.simulated.records import DirectoryGone, DiskGone, DiskMade, DiskSet, ImageCached, SimulatedDisk
from instar.hypervisor.simulated.snapshot_file import write_snapshot
from instar.model.guest import DiskDefinition, ImageSource, SnapshotTaken, SnapshotTarget, WorkProgress

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
SEND_IDLE_S = 30.0
KEPT = "kept"  # behind a disk's name, while it is put away


class Disks:
    __slots__ = ("_faults", "_fetching", "_images", "_machine", "_settings")

    def __init__(self, machine: Machine, settings: SimulatedSettings, images: ImageCheck, faults: HostFaults) -> None:
        self._machine = machine
        self._settings = settings
        self._images = images
        self._faults = faults
        self._fetching: dict[str, asyncio.Future[None]] = {}

    # --- images -----------------------------------------------------------------------------------------------------

    async def fetch(self, image: ImageSource) -> None:
        while image.sha256 not in self._machine.images:
            fetching = self._fetching.get(image.sha256)
            if fetching is None:
                await self._fetch_now(image)
            else:
                await asyncio.wait([fetching])  # then look again: the one who fetched may have failed
        self._machine.use_image(image.sha256)

    async def _fetch_now(self, image: ImageSource) -> None:
        fetching = self._fetching[image.sha256] = asyncio.get_running_loop().create_future()
        try:
            if self._settings.image_s:
                await asyncio.sleep(self._settings.image_s)
            content = await self._images.check(image)
            self._machine.change(ImageCached(self._machine.name, image.sha256, content))
        finally:
            del self._fetching[image.sha256]
            fetching.set_result(None)

    # --- disks ------------------------------------------------------------------------------------------------------

    def make(self, instance_id: str, disk: DiskDefinition) -> None:
        check_id(instance_id)
        if disk.name in self._machine.disks_of(instance_id):
            return
        self.check_room()
        sha256 = ""
        if disk.image is not None:
            sha256 = disk.image.sha256
            if sha256 not in self._machine.images:
                raise HypervisorError(reason=f"image {disk.image.id} is not in the cache of the host")
        self._machine.change(DiskMade(self._machine.name, instance_id, disk.name, disk.size_bytes, sha256))

    def grow(self, instance_id: str, disk: DiskDefinition) -> None:
        self._check_off(instance_id)
        there = self._machine.disks_of(instance_id).get(disk.name)
        if there is None:
            self.make(instance_id, disk)
            return
        if there.size_bytes >= disk.size_bytes:
            return
        self.check_room()
        grown = msgspec.structs.replace(there, size_bytes=disk.size_bytes)
        self._machine.change(DiskSet(self._machine.name, instance_id, disk.name, grown))

    def remove(self, instance_id: str, name: str) -> None:
        check_id(instance_id)
        if name not in self._machine.disks_of(instance_id):
            return
        guest = self._machine.running(instance_id)
        if guest is not None and name in guest.disks:
            raise HypervisorError(reason=f"disk {name} is in use by the running guest")
        self._machine.change(DiskGone(self._machine.name, instance_id, name))

    def keep(self, instance_id: str, name: str) -> None:
        self._check_off(instance_id)
        disks = self._machine.disks_of(instance_id)
        if name in disks and name + KEPT not in disks:
            self._rename(instance_id, name, name + KEPT, disks[name])

    def restore(self, instance_id: str, name: str) -> None:
        self._check_off(instance_id)
        disks = self._machine.disks_of(instance_id)
        if name + KEPT in disks:
            self._rename(instance_id, name + KEPT, name, disks[name + KEPT])

    def remove_all(self, instance_id: str) -> None:
        check_id(instance_id)
        if self._machine.running(instance_id) is not None:
            raise HypervisorError(reason="the disks of a running guest cannot be removed")
        self._machine.forget_saved(instance_id)
        if instance_id in self._machine.directories:
            self._machine.change(DirectoryGone(self._machine.name, instance_id))

    def _rename(self, instance_id: str, old: str, new: str, disk: SimulatedDisk) -> None:
        host = self._machine.name
        self._machine.change(DiskSet(host, instance_id, new, disk), DiskGone(host, instance_id, old))

    def _check_off(self, instance_id: str) -> None:
        """Raises HypervisorError, also where there would be nothing to do, as libvirt hosts do."""
        check_id(instance_id)
        if self._machine.running(instance_id) is not None:
            raise HypervisorError(reason="the guest runs, its disks cannot be changed")

    def check_room(self) -> None:
        """Raises DiskFull."""
        if self._faults.disk_full:
            raise DiskFull(filesystem="/", host=self._machine.name)

    # --- snapshots --------------------------------------------------------------------------------------------------

    async def snapshot(self, instance_id: str, name: str, target: SnapshotTarget, report: Report) -> SnapshotTaken:
        check_id(instance_id)
        disk = self._machine.disks_of(instance_id).get(name)  # as it is now: what is written from here on is not on it
        if disk is None:
            raise HypervisorError(reason=f"disk {name} does not exist")
        await take_time(self._settings.snapshot_s, instance_id, report)
        self.check_room()
        try:
            size_bytes = await asyncio.to_thread(_write, target, disk)
        except FileNotFoundError as error:
            raise ImageGone(image_id=target.image_id) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(filesystem="/", host=self._machine.name) from error
            raise HypervisorError(reason=f"the snapshot cannot be written: {error.strerror}") from error
        report(WorkProgress(instance_id, 100))
        return SnapshotTaken(size_bytes, disk.size_bytes)


def _write(target: SnapshotTarget, disk: SimulatedDisk) -> int:
    """Blocking: the snapshot where it is wanted, in a file or by HTTP; its size."""
    path = file_of(target.location)
    if path is not None:
        return write_snapshot(path, target.format, disk.size_bytes, disk.content)
    with tempfile.TemporaryDirectory(prefix="instar-snapshot-") as folder:
        path = Path(folder) / "disk"
        size_bytes = write_snapshot(path, target.format, disk.size_bytes, disk.content)
        send(
            path, target.location, target.image_id, idle_timeout_s=SEND_IDLE_S, stop=threading.Event(),
            tell=lambda _percent: None,
        )  # fmt: skip
        return size_bytes


def check_id(instance_id: str) -> None:
    """Ids become file names on real hosts, so nothing but a UUID is taken here either. Raises HypervisorError."""
    if not _UUID(instance_id):
        raise HypervisorError(reason="the id of the instance is not a UUID")
