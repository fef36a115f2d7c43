"""The few bytes of a qcow2 header that decide whether a file may be stored. Called by `inspect.py`.

The format inspector library knows formats, backing files and feature bits; it does not look at encryption, header
extensions and sizes of tables, which is what stands here. Layout: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct

from instar.errors import ImageUnusable

HEADER_READ_BYTES = 65_536  # enough for every header with its extensions that a tool writes

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3_LENGTH_OFFSET = 100
_V3_HEADER_MIN_BYTES = 104
_CLUSTER_BITS = range(9, 22)  # 512 bytes to 2 MiB, what QEMU itself accepts
_L1_MAX_ENTRIES = 32 * 1024 * 1024 // 8  # QEMU's own limit: 32 MiB of level 1 table
_EXTENSION_END = 0
_REFUSED_EXTENSIONS = {
    0x44415441: "an external data file",
    0x0537BE77: "encryption",
}
_EXTENSIONS_MAX = 64


def check_qcow2_header(head: bytes, *, file_size_bytes: int) -> int:
    """The virtual size in bytes. `head` is the beginning of the file, at most HEADER_READ_BYTES.

    Raises ImageUnusable for a header that is cut off, encrypted, or absurd."""
    if len(head) < _V2.size:
        raise ImageUnusable("The qcow2 header is cut off.")
    fields = _V2.unpack_from(head)
    version, backing_offset, cluster_bits, virtual_size, crypt_method = fields[1], fields[2], *fields[4:7]
    l1_entries, l1_offset, refcounts_offset = fields[7:10]
    if version not in (2, 3):
        raise ImageUnusable(f"Version {version} of qcow2 is not supported.")
    if backing_offset:
        raise ImageUnusable("The qcow2 image has a backing file, which is not allowed.")
    if crypt_method:
        raise ImageUnusable("The qcow2 image is encrypted, which is not supported.")
    if cluster_bits not in _CLUSTER_BITS:
        raise ImageUnusable("The qcow2 header has an impossible cluster size.")
    _check_tables(virtual_size, cluster_bits, l1_entries, l1_offset, refcounts_offset, file_size_bytes)
    if version == 3:
        _check_extensions(head, cluster_bits)
    return int(virtual_size)


def _check_tables(
    virtual_size: int, cluster_bits: int, l1_entries: int, l1_offset: int, refcounts_offset: int, file_size: int
) -> None:
    bytes_per_l1_entry = (1 << cluster_bits) * ((1 << cluster_bits) // 8)
    needed = -(-virtual_size // bytes_per_l1_entry)
    if l1_entries > _L1_MAX_ENTRIES or needed > _L1_MAX_ENTRIES or l1_entries < needed:
        raise ImageUnusable("The qcow2 header has an impossible level 1 table.")
    if l1_offset + l1_entries * 8 > file_size or refcounts_offset >= file_size:
        raise ImageUnusable("The qcow2 image is cut off: its tables lie behind the end of the file.")


def _check_extensions(head: bytes, cluster_bits: int) -> None:
    if len(head) < _V3_HEADER_MIN_BYTES:
        raise ImageUnusable("The qcow2 header is cut off.")
    (position,) = struct.unpack_from(">I", head, _V3_LENGTH_OFFSET)
    end = min(1 << cluster_bits, len(head))
    if not _V3_HEADER_MIN_BYTES <= position <= end:
        raise ImageUnusable("The qcow2 header has an impossible length.")
    for _ in range(_EXTENSIONS_MAX):
        if position + 8 > end:
            return
        kind, length = struct.unpack_from(">II", head, position)
        if kind == _EXTENSION_END:
            return
        if kind in _REFUSED_EXTENSIONS:
            raise ImageUnusable(f"The qcow2 image asks for {_REFUSED_EXTENSIONS[kind]}, which is not allowed.")
        position += 8 + (length + 7) // 8 * 8
    raise ImageUnusable("The qcow2 header has too many extensions.")
