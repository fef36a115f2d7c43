"""The disks of instances: qcow2 overlays on cached base images, and blank disks.

The driver calls it. A disk that exists is never touched; a new one appears under its name only when it is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import uuid
from pathlib import Path

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.host_command import run_limited
from instar.hypervisor.libvirt.host_paths import FULL, HostPaths, disk_full
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import DiskDefinition


class InstanceDisks:
    """The instance directories of one state directory."""

    def __init__(self, paths: HostPaths, *, settings: LibvirtSettings, host: str) -> None:
        self._paths, self._settings, self._host = paths, settings, host

    async def ensure(self, instance_id: str, disk: DiskDefinition) -> None:
        """The disk's file exists. Raises HypervisorError when its image is not in the cache, DiskFull."""
        path = self._paths.disk(instance_id, disk.name)
        if await asyncio.to_thread(path.exists):
            return
        size_bytes, backing = disk.size_bytes, []
        if disk.image is not None:
            base = self._paths.image(disk.image.sha256)
            if not await asyncio.to_thread(base.exists):
                raise HypervisorError(reason=f"image {disk.image.id} is not in the host's cache")
            size_bytes = max(size_bytes, disk.image.virtual_size_bytes)
            backing = ["-b", str(base), "-F", disk.image.format]
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        await asyncio.to_thread(self._make_directory, path.parent)
        command = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(part), str(size_bytes)]
        try:
            await run_limited(command, settings=self._settings, host=self._host, writes_to=path)
            await asyncio.to_thread(self._publish, part, path)
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)

    async def ensure_none(self, instance_id: str) -> None:
        """The instance's directory is gone with all that is in it."""
        await asyncio.to_thread(self._remove, self._paths.instance(instance_id))

    def _make_directory(self, directory: Path) -> None:
        try:
            # 0711: libvirtd may run QEMU as another user, which must reach its files but list nothing.
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(directory, self._host) from error
            raise

    def _publish(self, part: Path, path: Path) -> None:
        """Written through before it gets its name: after a power failure the disk is complete or not there."""
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
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
        self._paths.release_link()


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
