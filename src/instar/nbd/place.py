"""Whether a path names the same directory here as where somebody else saw it: another machine may have one of that name."""

from __future__ import annotations

from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def place_of(directory: Path) -> str:
    """The directory as nothing else in the world is named: the start of its machine, file system and inode. Empty when
    there is none. Blocking."""
    try:
        seen = directory.stat()
        return f"{_BOOT_ID.read_text(encoding='ascii').strip()}:{seen.st_dev}:{seen.st_ino}"
    except OSError:
        return ""
