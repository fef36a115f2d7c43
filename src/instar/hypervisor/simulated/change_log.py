"""The file in which simulated hosts survive the process: one framed record for each change, appended with os.write.

It stands for what real hosts keep outside of our process (domains, disks, taps), so it must survive kill -9, not a
power cut: no fsync. An append is a copy into the page cache, a few microseconds, and so is done on the event loop.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from instar.hypervisor.simulated.records import Change, LogRecord, Together

_FRAME = struct.Struct("<II")  # length of the body, its CRC-32
RECORD_MAX_BYTES = 16 << 20  # a length beyond this is garbage, not a record
COMPACT_MIN_BYTES = 32 << 20  # below this a log is not worth rewriting while the process runs
COMPACT_GROWTH = 4  # rewritten when it is so many times as big as after the last rewriting

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(LogRecord).decode


def framed(records: Iterable[LogRecord]) -> bytes:
    parts: list[bytes] = []
    for record in records:
        body = _encode(record)
        parts += (_FRAME.pack(len(body), zlib.crc32(body)), body)
    return b"".join(parts)


class ChangeLog:
    """The log at `path`, made when it is not there. `rewrite` must be called once before the first `append`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._bytes = 0
        self._bytes_rewritten = 0

    def read(self) -> Iterator[Change]:
        """The changes of every whole record, oldest first. Ends at the first torn one: nothing was appended after it."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        position = 0
        while position + _FRAME.size <= len(content):
            length, checksum = _FRAME.unpack_from(content, position)
            position += _FRAME.size
            body = content[position : position + length]
            if length > RECORD_MAX_BYTES or len(body) < length or zlib.crc32(body) != checksum:
                return
            record = _decode(body)
            if isinstance(record, Together):
                yield from record.changes
            else:
                yield record
            position += length

    def rewrite(self, changes: Iterable[Change]) -> None:
        """The log holds exactly these changes; an end of the process in between leaves the old log."""
        self.close()
        fresh = self._path.with_suffix(".new")
        content = framed(changes)
        fresh.write_bytes(content)
        fresh.replace(self._path)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._bytes = self._bytes_rewritten = len(content)

    def append(self, changes: tuple[Change, ...]) -> None:
        """Add changes, all of them or none. Raises OSError when they could not be written whole."""
        if self._fd is None:
            raise OSError("the log of the simulated hosts is closed")
        content = framed(changes if len(changes) == 1 else (Together(changes),))
        if os.write(self._fd, content) < len(content):
            os.ftruncate(self._fd, self._bytes)  # a torn record would hide all that is appended after it
            raise OSError("the log of the simulated hosts could not be written")
        self._bytes += len(content)

    @property
    def wants_rewrite(self) -> bool:
        return self._bytes > max(COMPACT_MIN_BYTES, COMPACT_GROWTH * self._bytes_rewritten)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
