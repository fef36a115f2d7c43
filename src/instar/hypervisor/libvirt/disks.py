"""The disks of instances: qcow2 overlays on cached base images, and blank disks.

The driver calls it. A disk that exists is never touched, but to make it larger or to give it another name; a new one
appears under its name only when it is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import uuid
from pathlib import Path

from instar.errors import HypervisorError
from instar.file_sync import sync_path
from instar.hypervisor.libvirt import ownership
from instar.hypervisor.libvirt.host_command import run_limited
from instar.hypervisor.libvirt.host_paths import FULL, HostPaths, disk_full
from instar.hypervisor.libvirt.qcow2_disk import write_empty_disk
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import DiskDefinition

KEPT_SUFFIX = "kept"
_QCOW2 = struct.Struct(">4s20xQ")  # the beginning of its header: the magic word, and the virtual size


class InstanceDisks:
    """The instance directories of one state directory."""

    def __init__(self, paths: HostPaths, *, settings: LibvirtSettings, host: str) -> None:
        self._paths, self._settings, self._host = paths, settings, host

    async def ensure(self, instance_id: str, disk: DiskDefinition) -> None:
        """The disk's file exists. Raises HypervisorError when its image is not in the cache, DiskFull."""
        path = self._paths.disk(instance_id, disk.name)
        if await asyncio.to_thread(path.exists):
            await asyncio.to_thread(self._claim, path.parent)
            return
        size_bytes, backing = disk.size_bytes, None
        if disk.image is not None:
            base = self._paths.image(disk.image.sha256)
            if not await asyncio.to_thread(base.exists):
                raise HypervisorError(reason=f"image {disk.image.id} is not in the host's cache")
            size_bytes = max(size_bytes, disk.image.virtual_size_bytes)
            backing = (str(base), disk.image.format)
        await asyncio.to_thread(self._claim, path.parent)
        await self.create(path, size_bytes, backing)

    async def create(self, path: Path, size_bytes: int, backing: tuple[str, str] | None) -> None:
        """An empty disk at `path`, on top of (file, format) `backing`: a relative file lies beside it. Raises DiskFull."""
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            await asyncio.to_thread(self._make, part, path, size_bytes, backing)
        except ValueError as error:
            raise HypervisorError(reason=f"there is no disk of {size_bytes} bytes") from error
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)

    def _make(self, part: Path, path: Path, size_bytes: int, backing: tuple[str, str] | None) -> None:
        try:
            write_empty_disk(part, size_bytes, backing)
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(path, self._host) from error
            raise
        self.publish(part, path)

    async def ensure_size(self, instance_id: str, disk: DiskDefinition) -> None:
        """The disk that exists is at least so large. Raises DiskFull, HypervisorError."""
        path = self._paths.disk(instance_id, disk.name)
        if await asyncio.to_thread(virtual_size_bytes, path) >= disk.size_bytes:
            return
        command = ["qemu-img", "resize", "-q", "-f", "qcow2", str(path), str(disk.size_bytes)]
        await run_limited(command, settings=self._settings, host=self._host, writes_to=path)

    async def ensure_no_disk(self, instance_id: str, name: str) -> None:
        path = self._paths.disk(instance_id, name)
        await asyncio.to_thread(path.unlink, missing_ok=True)

    async def ensure_kept(self, instance_id: str, name: str) -> None:
        """The disk has the name of one that was put away, unless one is put away already."""
        await asyncio.to_thread(self._keep, self._paths.disk(instance_id, name), self._kept(instance_id, name))

    async def ensure_restored(self, instance_id: str, name: str) -> None:
        """What was put away is the disk again; one that took its place is gone."""
        await asyncio.to_thread(self._restore, self._kept(instance_id, name), self._paths.disk(instance_id, name))

    def _kept(self, instance_id: str, name: str) -> Path:
        return self._paths.disk(instance_id, name + KEPT_SUFFIX)

    def _keep(self, path: Path, kept: Path) -> None:
        if not kept.exists() and path.exists():
            path.rename(kept)
            sync_path(path.parent)

    def _restore(self, kept: Path, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(kept, path)  # noqa: PTH105 - the one word that says it overwrites
            sync_path(path.parent)

    async def ensure_none(self, instance_id: str) -> None:
        """The instance's directory is gone with all that is in it, unless it is another host's."""
        await asyncio.to_thread(self._remove, self._paths.instance(instance_id))

    def _claim(self, directory: Path) -> None:
        """The directory exists and is this host's."""
        try:
            make_directory(directory)
            ownership.claim(directory, self._host)
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(directory, self._host) from error
            raise

    def publish(self, part: Path, path: Path) -> None:
        """Blocking. Written through before it gets its name: after a power failure the disk is complete or not there."""
        try:
            part.chmod(0o600)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.rename(path)
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(path, self._host) from error
            raise

    def _remove(self, directory: Path) -> None:
        if not ownership.give_back(directory, self._host):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(directory)
        self._paths.release_link()


def virtual_size_bytes(path: Path, disk_format: str = "qcow2") -> int:
    """The size of a disk in a file of ours, as a guest sees it. Of a qcow2 it stands in the header, which guests cannot
    reach; so no program is run for it. Blocking. Raises HypervisorError where there is no such file, or it is no qcow2."""
    try:
        if disk_format != "qcow2":
            return path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_QCOW2.size)
    except FileNotFoundError:
        raise HypervisorError(reason="a disk of the instance does not exist") from None
    if len(header) == _QCOW2.size:
        magic, size_bytes = _QCOW2.unpack(header)
        if magic == b"QFI\xfb":
            return int(size_bytes)
    raise HypervisorError(reason="a disk of the instance is damaged: it has no qcow2 header")


def make_directory(directory: Path) -> None:
    """Blocking. 0711: libvirtd may run QEMU as another user, which must reach its files but list nothing."""
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)


def supports_direct_io(directory: Path) -> bool:
    """The file system of `directory` takes O_DIRECT, so that guests need no page cache of the host. Blocking."""
    probe = directory / f".direct-{uuid.uuid4().hex}"
    try:
        descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    except OSError:
        return False
    else:
        os.close(descriptor)
        return True
    finally:
        probe.unlink(missing_ok=True)
