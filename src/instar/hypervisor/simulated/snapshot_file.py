"""The file of a snapshot: a real image, small, whose first bytes a guest would read are what the simulated disk holds.

Written for `take_snapshot`, read when a host fetches an image. A qcow2 file is built here from six clusters, since
hundreds are made in a second where qemu-img needs tens of milliseconds for one. Layout: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import msgspec

from instar.hypervisor.simulated.records import SimulatedContent

CONTENT_MAX_BYTES = 1 << 20
SECTOR_BYTES = 512

_MARK = b"INSTAR-SIMULATED-DISK\n"
_LENGTH = struct.Struct(">I")
_QCOW2_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")  # version 3, 104 bytes
_HEADER_START = struct.Struct(">4sIQIIQIIQ")  # as far as the offset of the level 1 table
_ENTRY = struct.Struct(">Q")
_COPIED = 1 << 63  # refcount is exactly one
_COMPRESSED = 1 << 62
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_CLUSTER_BITS_MIN, _CLUSTER_BITS_MAX = 12, 21
_REFCOUNT_ORDER = 4  # 16 bits

_decode = msgspec.json.Decoder(SimulatedContent).decode


def write_snapshot(path: Path, disk_format: str, virtual_size_bytes: int, content: SimulatedContent) -> int:
    """Write an image of this virtual size, and return the file's size. It has its name when it is whole.

    Raises OSError; FileNotFoundError when the directory is not there."""
    body = msgspec.json.encode(content)
    data = _MARK + _LENGTH.pack(len(body)) + body
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            if disk_format == "qcow2":
                _write_qcow2(file, _sectors(virtual_size_bytes), data)
            else:
                file.write(data)
                file.truncate(max(len(data), virtual_size_bytes))
            size = file.seek(0, os.SEEK_END)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return size


def read_snapshot(path: Path) -> SimulatedContent | None:
    """What the image at `path` has on it; None for one that no simulated host wrote. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(_HEADER_START.size)
        is_qcow2 = head[:4] == _QCOW2_MAGIC and len(head) == _HEADER_START.size
        start_bytes = len(_MARK) + _LENGTH.size
        start = _read_guest(file, head, start_bytes) if is_qcow2 else _read_raw(file, start_bytes)
        if len(start) < start_bytes or not start.startswith(_MARK):
            return None
        (length,) = _LENGTH.unpack_from(start, len(_MARK))
        if length > CONTENT_MAX_BYTES:
            return None
        whole = start_bytes + length
        data = _read_guest(file, head, whole) if is_qcow2 else _read_raw(file, whole)
    try:
        return _decode(data[start_bytes:])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


# --- qcow2 ----------------------------------------------------------------------------------------------------------


def _sectors(size_bytes: int) -> int:
    return max(1, -(-size_bytes // SECTOR_BYTES)) * SECTOR_BYTES


def _cluster_bits(virtual_size: int) -> int:
    """The smallest clusters with which the level 1 table fits into one: it covers 2^(3 * bits - 6) bytes."""
    bits = _CLUSTER_BITS_MIN
    while bits < _CLUSTER_BITS_MAX and 1 << (3 * bits - 6) < virtual_size:
        bits += 1
    return bits


def _write_qcow2(file: BinaryIO, virtual_size: int, data: bytes) -> None:
    """Clusters: header, refcount table, refcount block, level 1 table, level 2 table, and those of the data."""
    bits = _cluster_bits(virtual_size)
    cluster = 1 << bits
    l1_entries = -(-virtual_size // (cluster * cluster // _ENTRY.size))
    data_clusters = -(-len(data) // cluster)
    header = _HEADER.pack(
        _QCOW2_MAGIC, 3, 0, 0, bits, virtual_size, 0, l1_entries, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0,
        _REFCOUNT_ORDER, _HEADER.size,
    )  # fmt: skip
    file.write(header)
    file.seek(cluster)
    file.write(_ENTRY.pack(2 * cluster))
    file.seek(2 * cluster)
    file.write(b"\0\1" * (5 + data_clusters))
    file.seek(3 * cluster)
    file.write(_ENTRY.pack(4 * cluster | _COPIED))
    file.seek(4 * cluster)
    file.write(b"".join(_ENTRY.pack((5 + number) * cluster | _COPIED) for number in range(data_clusters)))
    file.seek(5 * cluster)
    file.write(data)
    file.truncate((5 + data_clusters) * cluster)


def _read_guest(file: BinaryIO, head: bytes, length: int) -> bytes:
    """The first bytes of the disk as a guest sees them; fewer where the image is not one that was written here."""
    bits, l1_offset = _HEADER_START.unpack(head)[4], _HEADER_START.unpack(head)[8]
    if not 9 <= bits <= _CLUSTER_BITS_MAX:
        return b""
    cluster = 1 << bits
    l2_offset = _entry(file, l1_offset)
    data = b""
    for number in range(min(-(-length // cluster), cluster // _ENTRY.size)):
        offset = _entry(file, l2_offset + number * _ENTRY.size) if l2_offset else 0
        if not offset:
            break
        data += os.pread(file.fileno(), min(cluster, length - len(data)), offset)
    return data


def _entry(file: BinaryIO, position: int) -> int:
    """The offset that a table has at this position; 0 for a hole, the table's end, or compressed data."""
    if position >= 1 << 62:
        return 0
    entry = os.pread(file.fileno(), _ENTRY.size, position)
    value = _ENTRY.unpack(entry)[0] if len(entry) == _ENTRY.size else 0
    return 0 if value & _COMPRESSED else value & _OFFSET_MASK


def _read_raw(file: BinaryIO, length: int) -> bytes:
    return os.pread(file.fileno(), length, 0)
