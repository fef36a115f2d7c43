"""A sparse file as cells: pieces of 1 MiB on a fixed grid, each with the ranges that hold data and a checksum.

Both sides read files this way, so that the digest of a file's beginning is the same at the source and in what has arrived,
wherever the two file systems put their holes: a cell that is all zeros is no cell, and a checksum covers holes as zeros.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

CELL_BYTES = 1 << 20
EXTENTS_MAX = CELL_BYTES // 512  # no file system has smaller blocks
CHECKSUM_BYTES = 32
ZEROS = bytes(CELL_BYTES)


class FileFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tells that a file is still the same, unchanged."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, descriptor: int) -> FileFacts:
        found = os.fstat(descriptor)
        return cls(size=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino, device=found.st_dev)


@dataclass(frozen=True, slots=True)
class FileCell:
    """`extents` are (offset in the cell, length); `content` is the whole cell, its holes as zeros."""

    index: int
    extents: list[tuple[int, int]]
    content: bytearray
    checksum: bytes


class FileShrank(Exception):
    """The file ended before its size."""


class FileDigest:
    """A digest over the cells of a file, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, index: int, checksum: bytes) -> None:
        self._hash.update(index.to_bytes(8, "big") + checksum)

    def so_far(self) -> bytes:
        return self._hash.copy().digest()

    def of_whole(self, size: int) -> bytes:
        whole = self._hash.copy()
        whole.update(size.to_bytes(8, "big"))
        return whole.digest()


def checksum_of(content: bytearray) -> bytes:
    return hashlib.sha256(content).digest()


def cell_length(index: int, size: int) -> int:
    """Bytes in a cell: the last one may be short. 0 or less: there is no such cell."""
    return min(CELL_BYTES, size - index * CELL_BYTES)


def read_cells(descriptor: int, size: int, first: int = 0, until: int | None = None) -> Iterator[FileCell]:
    """The cells with data, from `first` up to but not including `until`. Raises FileShrank, OSError."""
    end = size if until is None else min(size, until * CELL_BYTES)
    position = first * CELL_BYTES
    while position < end and (position := _seek(descriptor, position, os.SEEK_DATA, end)) < end:
        index = position // CELL_BYTES
        start = index * CELL_BYTES
        content = bytearray(cell_length(index, size))
        extents = list(_extents(descriptor, position, start, start + len(content)))
        with memoryview(content) as view:
            for offset, length in extents:
                _fill(descriptor, view[offset : offset + length], start + offset)
        if content != ZEROS[: len(content)]:
            yield FileCell(index, extents, content, checksum_of(content))
        position = start + CELL_BYTES


def _extents(descriptor: int, position: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    while position < end:
        hole = _seek(descriptor, position, os.SEEK_HOLE, end)
        yield position - start, hole - position
        position = _seek(descriptor, hole, os.SEEK_DATA, end) if hole < end else end


def _seek(descriptor: int, position: int, whence: int, end: int) -> int:
    try:
        return min(os.lseek(descriptor, position, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return end
        if error.errno == errno.EINVAL:  # a file system that knows no holes: it is all data
            return position if whence == os.SEEK_DATA else end
        raise


def _fill(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        got = os.preadv(descriptor, [view], position)
        if not got:
            raise FileShrank
        view, position = view[got:], position + got
