"""What the header of a qcow2 file says, read without QEMU: also of one that a guest has open. Used by the moves of disks
and by the image cache.

Layout: docs/interop/qcow2.txt of QEMU. Guests cannot write it: they see what is inside.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from instar.errors import HypervisorError

_HEADER = struct.Struct(">4sIQIIQ")  # magic, version, offset and length of the backing name, cluster bits, virtual size
_EXTENSION = struct.Struct(">II")
_MAGIC = b"QFI\xfb"
_NAME_MAX_BYTES = 1023
_HEADER_LENGTH_V2 = 72
_HEADER_LENGTH_AT = 100
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE = 0x44415441
_DATA_ELSEWHERE = 1 << 2  # of the incompatible features
_SAYS_MAX_BYTES = 16
_EXTENSIONS_MAX = 32


class Qcow2Header(msgspec.Struct, frozen=True):
    """`backing` is as it is written, relative to the file's directory or absolute; empty: none. `elsewhere`: the data is in
    another file than this one, or may be."""

    virtual_size_bytes: int
    backing: str = ""
    backing_format: str = ""
    elsewhere: bool = False


def read_header(path: Path) -> Qcow2Header:
    """Blocking. Raises HypervisorError for what is no qcow2 file, FileNotFoundError."""
    with path.open("rb") as file:
        start = file.read(_HEADER_LENGTH_AT + 4)
        if len(start) < _HEADER_LENGTH_V2 or not start.startswith(_MAGIC):
            raise HypervisorError(reason=f"the file of disk {path.stem} is damaged")
        _magic, version, offset, length, _bits, size = _HEADER.unpack_from(start)
        header_length = int.from_bytes(start[_HEADER_LENGTH_AT:], "big") if version >= 3 else _HEADER_LENGTH_V2
        extensions = dict(_extensions(file.fileno(), header_length))
        features = int.from_bytes(start[_HEADER_LENGTH_V2 : _HEADER_LENGTH_V2 + 8], "big") if version >= 3 else 0
        elsewhere = bool(features & _DATA_ELSEWHERE) or _DATA_FILE in extensions
        if not offset:
            return Qcow2Header(size, elsewhere=elsewhere)
        if length > _NAME_MAX_BYTES:
            raise HypervisorError(reason=f"the file of disk {path.stem} is damaged")
        name = os.fsdecode(os.pread(file.fileno(), length, offset))
        backing_format = extensions.get(_BACKING_FORMAT, b"").decode(errors="replace")
        return Qcow2Header(size, name, backing_format, elsewhere)


def _extensions(descriptor: int, position: int) -> Iterator[tuple[int, bytes]]:
    """Kind and the beginning of what each says."""
    for _ in range(_EXTENSIONS_MAX):
        head = os.pread(descriptor, _EXTENSION.size, position)
        if len(head) < _EXTENSION.size:
            return
        kind, length = _EXTENSION.unpack(head)
        if kind == 0:
            return
        yield kind, os.pread(descriptor, min(length, _SAYS_MAX_BYTES), position + _EXTENSION.size)
        position += _EXTENSION.size + (length + 7) // 8 * 8
