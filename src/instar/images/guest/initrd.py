"""The initial RAM disk as a cpio archive ("newc" format), written here because only so it needs neither root nor cpio.

Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import gzip
import stat
from pathlib import Path

from instar.images.guest.kernel import ROOT_DISK_MODULES, KernelModules

CONSOLE_DEVICE = (5, 1)


class CpioArchive:
    """Collects entries; `content` gives the archive. All belong to root and carry no time, so builds are repeatable."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add_directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755)

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def add_link(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, name: str, device: tuple[int, int]) -> None:
        self._add(name, stat.S_IFCHR | 0o600, device=device)

    def content(self) -> bytes:
        closing = CpioArchive()
        closing._add("TRAILER!!!", 0)
        return b"".join([*self._parts, *closing._parts])

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [_padded(header + encoded), _padded(content)]


def build_initrd(busybox_static: Path, init_script: bytes, modules: KernelModules) -> bytes:
    """The gzipped initial RAM disk: loads the root disk's driver, grows the disk's partition, and hands over to it."""
    archive = CpioArchive()
    for directory in ("bin", "dev", "proc", "sys", "root", "modules"):
        archive.add_directory(directory)
    archive.add_character_device("dev/console", CONSOLE_DEVICE)
    archive.add_file("bin/busybox", busybox_static.read_bytes(), 0o755)
    archive.add_link("bin/sh", "busybox")
    order = modules.load_order(ROOT_DISK_MODULES)
    for name in order:
        archive.add_file(f"modules/{name}.ko", modules.content(name))
    archive.add_file("modules/order", "".join(f"{name}\n" for name in order).encode())
    archive.add_file("init", init_script, 0o755)
    return gzip.compress(archive.content(), 9, mtime=0)


def _padded(part: bytes) -> bytes:
    return part + b"\0" * (-len(part) % 4)
