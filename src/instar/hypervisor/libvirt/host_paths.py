"""Where the files of one cloud's guests lie on a host, and the names that are derived from that place.

    STATE_DIR/cache/SHA256                a base image, read only
    STATE_DIR/instances/INSTANCE_ID/      all of one instance: NAME.qcow2, config.iso, console.log, vnc.sock, console.sock
    STATE_DIR/instances/ID_resize/        what was all of it before a move that waits to be confirmed
    RUNTIME_ROOT/instar-CLOUD/            short paths for sockets, and the runtime of a private libvirtd

Used by the driver, the disks and the private daemon. Nothing here does more than a `stat`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import uuid
from pathlib import Path

from instar.errors import DiskFull, HypervisorError

SOCKET_PATH_MAX = 100  # of the 107 bytes that a Unix socket address holds
CLOUD_ID_LENGTH = 12
ASIDE_SUFFIX = "_resize"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class HostPaths:
    """The places of one state directory. `cloud_id` is the same for every process that uses the directory."""

    def __init__(self, state_dir: Path, *, runtime_root: Path = Path("/run")) -> None:
        self.state_dir = state_dir.resolve()
        self.cloud_id = hashlib.sha256(os.fsencode(self.state_dir)).hexdigest()[:CLOUD_ID_LENGTH]
        self.cache = self.state_dir / "cache"
        self.instances = self.state_dir / "instances"
        self.runtime = runtime_root / f"instar-{self.cloud_id}"
        self._link = self.runtime / "state"
        self._link_lock = threading.Lock()  # an instance has its directory before it asks for the link

    def instance(self, instance_id: str) -> Path:
        """The directory of an instance. Raises HypervisorError for what is no UUID: it must never name a directory."""
        try:
            if str(uuid.UUID(instance_id)) != instance_id:
                raise ValueError(instance_id)
        except ValueError as error:
            raise HypervisorError(reason="the instance id is not a UUID") from error
        return self.instances / instance_id

    def aside(self, instance_id: str) -> Path:
        """Where the directory of an instance is put aside. Raises HypervisorError for what is no UUID."""
        return self.instances / (self.instance(instance_id).name + ASIDE_SUFFIX)

    def disk(self, instance_id: str, name: str) -> Path:
        """The file of a disk. Raises HypervisorError when the name is not a plain word."""
        if not (name.isascii() and name.isalnum()):
            raise HypervisorError(reason="the disk name is not a plain word")
        return self.instance(instance_id) / f"{name}.qcow2"

    def image(self, sha256: str) -> Path:
        """The cached file of an image. Raises HypervisorError when the checksum is not one."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise HypervisorError(reason="the image's SHA-256 is malformed")
        return self.cache / sha256

    def config_drive(self, instance_id: str) -> Path:
        return self.instance(instance_id) / "config.iso"

    def console_log(self, instance_id: str) -> Path:
        return self.instance(instance_id) / "console.log"

    def socket(self, instance_id: str, name: str) -> Path:
        """The path of a socket in the instance's directory, by way of a short link where the straight one is too long.

        Blocking: makes the link when it is needed and missing."""
        straight = self.instance(instance_id) / name
        if len(os.fsencode(straight)) < SOCKET_PATH_MAX:
            return straight
        with self._link_lock:
            self.runtime.mkdir(mode=0o711, parents=True, exist_ok=True)
            if not self._link.is_symlink():
                self._link.symlink_to(self.state_dir)
        return self._link / "instances" / instance_id / name

    def release_link(self) -> None:
        """Nothing is left in the runtime directory once no instance needs the short paths. Blocking."""
        with self._link_lock:
            if self.instance_ids():
                return
            self._link.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not there, or a private libvirtd lives in it
                self.runtime.rmdir()

    def instance_ids(self) -> tuple[str, ...]:
        """Instances that have a directory, sorted. Blocking."""
        return _names(self.instances, 36)

    def aside_ids(self) -> tuple[str, ...]:
        """Instances of which something is set aside, sorted. Blocking."""
        names = _names(self.instances, 36 + len(ASIDE_SUFFIX))
        return tuple(name[:36] for name in names if name.endswith(ASIDE_SUFFIX))

    def cached_images(self) -> tuple[str, ...]:
        """SHA-256 of the cached images, sorted. Blocking."""
        return _names(self.cache, 64)


def _names(directory: Path, length: int) -> tuple[str, ...]:
    try:
        return tuple(sorted(entry.name for entry in directory.iterdir() if len(entry.name) == length))
    except FileNotFoundError:
        return ()


def mount_point(path: Path) -> Path:
    """The mount point of the file system that holds `path` or, when it does not exist, its nearest parent. Blocking."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path


def disk_full(path: Path, host: str) -> DiskFull:
    """The error for a write to `path` that found no room. Blocking."""
    return DiskFull(filesystem=str(mount_point(path)), host=host)
