"""A note on a file of what its SHA-256 was and when: by it a host that shares the image service's disk need not read the
very same file again that was read a moment ago on this machine.

Written by the images room, read by a host's image cache. It is an extended attribute of the file: who may write it may
write the file, so it is worth as much as the file's name, which is its SHA-256 too. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_NAME = "user.instar.sha256"
FRESH_S = 300.0  # after that the disk is asked again whether it still has what it was given


def note_hash(path: Path, sha256: str, stat: os.stat_result) -> None:
    """`stat` is of the file as it was read. Where there are no such attributes, nothing."""
    with contextlib.suppress(OSError):
        os.setxattr(path, _NAME, f"{sha256} {_state(stat)} {_boot_id()} {time.monotonic():.3f}".encode())


def was_hashed_lately(path: Path, sha256: str) -> bool:
    """The file has that SHA-256: it was read since this machine started, lately, and not changed after that."""
    try:
        noted = os.getxattr(path, _NAME).decode()
        said, at_s = noted.rsplit(" ", 1)
        age_s = time.monotonic() - float(at_s)
        return said == f"{sha256} {_state(path.stat())} {_boot_id()}" and 0 <= age_s < FRESH_S
    except (OSError, ValueError):
        return False


def _state(stat: os.stat_result) -> str:
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
