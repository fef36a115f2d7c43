"""Which cached images the disks of this host stand on, read from the disks themselves. Called by `cache_sweep.py`.

No book is kept of it: whatever lies in an instance's directory counts, also what is set aside or half made. The look at
the directories is safe against disks that are renamed meanwhile; one that is made meanwhile is `ImageCache.hold`'s matter.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from instar.hypervisor.libvirt.host_paths import HostPaths

_HEADER = struct.Struct(">4sIQI")  # magic, version, offset and length of the backing file's name
_MAGIC = b"QFI\xfb"
_NAME_MAX_BYTES = 1023  # QEMU's own limit
_CHAIN_MAX = 32
_PASSES_MAX = 20
_DEPTH_MAX = 8
_SHA256 = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


class DisksInMotion(Exception):
    """So many disks were renamed during the look that it says nothing: try again later."""


def images_in_use(paths: HostPaths) -> set[str]:
    """SHA-256 of the images that some disk needs. Blocking. Raises DisksInMotion, OSError: then nothing is known."""
    used: set[str] = set()
    looked_at: set[str] = set()
    for _ in range(_PASSES_MAX):
        try:
            names = {entry.name for entry in paths.instances.iterdir()}
        except FileNotFoundError:
            return used
        # A directory that was renamed comes with its new name in a later pass.
        waiting = names - looked_at
        if not waiting:
            return used
        for name in waiting:
            if _look_into(paths.instances / name, used, 0):
                looked_at.add(name)
    raise DisksInMotion


def _look_into(directory: Path, used: set[str], depth: int) -> bool:
    """Add what the files of this directory stand on. False where files came, went or moved: look again."""
    if depth > _DEPTH_MAX:
        raise DisksInMotion
    try:
        before = directory.stat()
        if not stat.S_ISDIR(before.st_mode):
            return True  # no instance has its disks beside the directories
        for entry in list(os.scandir(directory)):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if not _look_into(path, used, depth + 1):
                    return False
            elif entry.is_file():
                used.update(_backing_images(path))
        return directory.stat().st_mtime_ns == before.st_mtime_ns
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def _backing_images(path: Path) -> Iterator[str]:
    """Every SHA-256 that is named in the chain of backing files below this file. Raises FileNotFoundError: not there."""
    name = _backing_name(path)
    for _ in range(_CHAIN_MAX):
        if not name:
            return
        yield from _SHA256.findall(name)
        path = path.parent / name  # an absolute name stays as it is
        try:
            name = _backing_name(path) if path.is_file() else ""
        except FileNotFoundError:
            return


def _backing_name(path: Path) -> str:
    """What a qcow2 file says it stands on; empty for none, and for a file of another kind."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return ""
        magic, _version, offset, length = _HEADER.unpack(head)
        if magic != _MAGIC or not offset or length > _NAME_MAX_BYTES:
            return ""
        return os.fsdecode(os.pread(file.fileno(), length, offset))
