"""The number of the kernel's packet filter, which grows by one with each change of it, whoever makes it.

By it `LinuxNetwork` knows that its filter is as it loaded it, without asking a program. Of nf_tables' netlink protocol
(linux/netfilter/nf_tables.h) this is all that is spoken here.
"""

from __future__ import annotations

import socket
import struct

_NETLINK_NETFILTER = 12
_NEW_GENERATION, _GET_GENERATION = 10 << 8 | 15, 10 << 8 | 16  # subsystem nftables
_REQUEST = 1
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ABOUT = struct.Struct("!BBH")  # family, version, resource
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_GENERATION_ID = 1
_ANSWER_MAX_BYTES = 8192
_ANSWER_MAX_S = 1.0


def filter_generation() -> int | None:
    """Of the network namespace of the caller; None where the kernel does not tell. Blocking, for microseconds."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as kernel:
            kernel.settimeout(_ANSWER_MAX_S)
            kernel.bind((0, 0))
            length = _HEADER.size + _ABOUT.size
            kernel.send(_HEADER.pack(length, _GET_GENERATION, _REQUEST, 1, 0) + _ABOUT.pack(0, 0, 0))
            return _generation_in(kernel.recv(_ANSWER_MAX_BYTES))
    except OSError:
        return None


def _generation_in(answer: bytes) -> int | None:
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != _NEW_GENERATION:
        return None
    at = _HEADER.size + _ABOUT.size
    while at + _ATTRIBUTE.size <= len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if kind == _GENERATION_ID and length == _ATTRIBUTE.size + 4:
            found: int = struct.unpack_from("!I", answer, at + _ATTRIBUTE.size)[0]
            return found
        at += max(_ATTRIBUTE.size, length + 3 & ~3)
    return None
