"""A file that is on its way: a part file beside its target, and a record of how far it is verified.

The record is written after the data, without waiting for the disk. After a power cut it may claim too much: so it is never
believed, but compared with the source by the digest of what is really there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import msgspec

from instar.file_sync import sync_path
from instar.streams.cut import Cut
from instar.streams.sparse import CELL_BYTES, FileDigest, FileFacts, FileShrank, read_cells

RECORD_EVERY_BYTES = 16 << 20


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    peer: str  # fingerprint of its certificate
    facts: FileFacts
    cells: int


class Part:
    """`cells` of the file are there, and `digest` is theirs; `facts` of the source, None: nothing is known of it yet."""

    def __init__(self, target: Path, name: str, peer: str) -> None:
        self._target, self._name, self._peer = target, name, peer
        self._path, self._record, self._new_record = part_paths(target)
        self._descriptor = -1
        self._unrecorded_bytes = 0
        self.facts: FileFacts | None = None
        self.cells = 0
        self.digest = FileDigest()

    def take(self) -> bool:
        """Open the part file, for us alone. False: another fetch has it now."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                        self._descriptor = descriptor
                        return True
            except BlockingIOError:
                os.close(descriptor)
                return False
            os.close(descriptor)  # who had it has finished meanwhile: it has become the target

    def resume(self, cut: Cut) -> None:
        """Take up what an earlier fetch of the same from the same peer left."""
        try:
            record = msgspec.json.decode(self._record.read_bytes(), type=_Record)
        except (OSError, msgspec.MsgspecError):
            return
        size = record.facts.size
        if (record.name, record.peer) != (self._name, self._peer) or os.fstat(self._descriptor).st_size != size:
            return
        digest = FileDigest()
        with contextlib.suppress(FileShrank):
            for cell in read_cells(self._descriptor, size, 0, record.cells):
                digest.add(cell.index, cell.checksum)
                cut.check()
            self.facts, self.cells, self.digest = record.facts, record.cells, digest

    def begin(self, facts: FileFacts, start: int) -> None:
        """From cell `start` on there is nothing yet; whatever the file has there is removed."""
        if start == 0:
            self.digest = FileDigest()
        self.facts, self.cells = facts, start
        os.ftruncate(self._descriptor, min(start * CELL_BYTES, facts.size))
        os.ftruncate(self._descriptor, facts.size)
        self._save()

    def write(self, index: int, extents: list[tuple[int, int]], content: bytearray, checksum: bytes) -> None:
        """A cell whose checksum was found right."""
        with memoryview(content) as view:
            for offset, length in extents:
                done = 0
                while done < length:
                    piece = view[offset + done : offset + length]
                    done += os.pwrite(self._descriptor, piece, index * CELL_BYTES + offset + done)
                self._unrecorded_bytes += length
        self.digest.add(index, checksum)
        self.cells = index + 1
        if self._unrecorded_bytes >= RECORD_EVERY_BYTES:
            self._save()

    def restart(self) -> None:
        """Nothing of what is there is good."""
        self.facts, self.cells, self.digest = None, 0, FileDigest()
        self._record.unlink(missing_ok=True)
        os.ftruncate(self._descriptor, 0)

    def finish(self) -> None:
        """On disk, and under its name."""
        os.fsync(self._descriptor)
        self._path.replace(self._target)
        sync_path(self._target.parent)
        self._record.unlink(missing_ok=True)

    def discard(self) -> None:
        for path in (self._path, self._record, self._new_record):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """What is there is kept, for another time."""
        if self._descriptor < 0:
            return
        if self.facts is not None and self._path.exists():
            with contextlib.suppress(OSError):  # only less is kept then
                self._save()
        os.close(self._descriptor)  # with it goes the lock
        self._descriptor = -1

    def _save(self) -> None:
        assert self.facts is not None
        record = _Record(self._name, self._peer, self.facts, self.cells)
        self._new_record.write_bytes(msgspec.json.encode(record))
        self._new_record.replace(self._record)
        self._unrecorded_bytes = 0


def part_paths(target: Path) -> tuple[Path, Path, Path]:
    """Of the part file, of its record, and of a record while it is written."""
    part = target.with_name(f".{target.name}.part")
    return part, part.with_name(part.name + ".json"), part.with_name(part.name + ".json.new")


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def mount_point(path: Path) -> Path:
    found = path.absolute()
    while not found.is_mount() and found != found.parent:
        found = found.parent
    return found
