"""Empty qcow2 disks, as `qemu-img create` makes them with its defaults, written without it: a few numbers in four
clusters, for which no program has to be started. Called by `disks.py`. Layout: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_REFCOUNT_ORDER = 4  # 16 bits for each cluster
_BYTES_OF_L1_ENTRY = _CLUSTER * (_CLUSTER // 8)
_TABLE, _BLOCK, _L1 = 1, 2, 3  # clusters: the table of refcounts, its one block, the level 1 table
_CLUSTERS_OF_BLOCK = _CLUSTER * 8 >> _REFCOUNT_ORDER
_NAME_MAX_BYTES = 1023  # of the backing file, as QEMU has it
SIZE_MAX_BYTES = 1 << 50  # what one block of refcounts is enough for, with much to spare


def write_empty_disk(path: Path, size_bytes: int, backing: tuple[str, str] | None) -> None:
    """A new file of our own at `path`: a disk on top of (file, format) `backing`, else of zeros. Not synced. Blocking.

    Raises OSError; ValueError where the size or the name of the backing file is more than the format has room for."""
    size_bytes = -(-size_bytes // 512) * 512
    entries = -(-size_bytes // _BYTES_OF_L1_ENTRY)
    clusters = _L1 + -(-entries * 8 // _CLUSTER)
    name, disk_format = (os.fsencode(backing[0]), backing[1].encode()) if backing is not None else (b"", b"")
    if not 0 < size_bytes <= SIZE_MAX_BYTES or clusters > _CLUSTERS_OF_BLOCK or len(name) > _NAME_MAX_BYTES:
        raise ValueError("no disk of that size on a file of that name")
    extensions = b""
    if disk_format:
        padded = disk_format.ljust(-(-len(disk_format) // 8) * 8, b"\0")
        extensions = _EXTENSION.pack(_BACKING_FORMAT, len(disk_format)) + padded
    extensions += _EXTENSION.pack(0, 0)
    header = _HEADER.pack(
        b"QFI\xfb", 3, _HEADER.size + len(extensions) if name else 0, len(name), _CLUSTER_BITS, size_bytes,
        0,  # not encrypted
        entries, _L1 * _CLUSTER, _TABLE * _CLUSTER, 1,
        0, 0,  # no snapshots
        0, 0, 0,  # no features
        _REFCOUNT_ORDER, _HEADER.size,
        0,  # zlib, where something is compressed
    )  # fmt: skip
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(header + extensions + name)
        file.seek(_TABLE * _CLUSTER)
        file.write(struct.pack(">Q", _BLOCK * _CLUSTER))
        file.seek(_BLOCK * _CLUSTER)
        file.write(struct.pack(">H", 1) * clusters)
        file.truncate(clusters * _CLUSTER)
