"""Questions to the kernel about addresses and routes, over its netlink socket (linux/rtnetlink.h): what `ip -j addr` and
`ip -j route` tell, in microseconds and without a process. Called in threads by `links.py` and `plumbing.py`.

A thread can put itself into another network namespace. The one that does is made for a single question and then ends: those
of a pool are never anywhere but where the process is.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_LINK = struct.Struct("=BxHiII")  # family, kind of hardware, index, flags, changed
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, destination's and source's length, TOS, table, protocol, scope, type, flags
_GET_LINK, _GET_ADDRESS, _GET_ROUTE = 18, 22, 26
_NEW = {_GET_LINK: 16, _GET_ADDRESS: 20, _GET_ROUTE: 24}
_DUMP = 0x301  # a request (1) for all there is (0x300)
_ERROR, _DONE = 2, 3
_CHANGED_MEANWHILE = 0x10
_LINK_ADDRESS, _LINK_NAME = 1, 3
_IP_ADDRESS, _IP_LOCAL = 1, 2
_ROUTE_DESTINATION, _ROUTE_OUT = 1, 4
_UP = 1
_KIND_MASK = 0x3FFF  # the rest of an attribute's type are flags
_ANSWER_MAX_BYTES = 1 << 17
_ANSWER_MAX_S = 5.0
_ATTEMPTS = 10
_CLONE_NEWNET = 0x40000000


class Interface(NamedTuple):
    name: str
    mac: str
    is_up: bool
    addresses: tuple[str, ...]  # IPv4, as address/prefix length


def interfaces() -> list[Interface]:
    """Of the caller's namespace. Blocking. Raises OSError."""
    addresses: dict[int, list[str]] = {}
    for body in _dump(_GET_ADDRESS, _ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0)):
        _, length, _, _, index = _ADDRESS.unpack_from(body)
        said = _attributes(body, _ADDRESS.size)
        address = said.get(_IP_LOCAL) or said.get(_IP_ADDRESS)
        if address is not None:
            addresses.setdefault(index, []).append(f"{ipaddress.IPv4Address(address)}/{length}")
    found = []
    for body in _dump(_GET_LINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, _, index, flags, _ = _LINK.unpack_from(body)
        said = _attributes(body, _LINK.size)
        name, mac = said.get(_LINK_NAME, b"").rstrip(b"\0").decode(), said.get(_LINK_ADDRESS, b"").hex(":")
        found.append(Interface(name, mac, bool(flags & _UP), tuple(addresses.get(index, ()))))
    return found


def routes() -> list[tuple[ipaddress.IPv4Network, str]]:
    """IPv4 routes of all tables of the caller's namespace, default routes too: (destination, interface's name or nothing).
    Blocking. Raises OSError."""
    names = dict(socket.if_nameindex())
    found = []
    for body in _dump(_GET_ROUTE, _ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)):
        family, length = _ROUTE.unpack_from(body)[:2]
        if family != socket.AF_INET:
            continue
        said = _attributes(body, _ROUTE.size)
        destination = ipaddress.IPv4Network((said.get(_ROUTE_DESTINATION, bytes(4)), length))
        out = said.get(_ROUTE_OUT)
        found.append((destination, names.get(struct.unpack("=I", out)[0], "") if out is not None else ""))
    return found


def inside(namespace: Path, question: Callable[[], T]) -> T:
    """What `question` returns in the namespace mounted at this path. Blocking. Raises OSError, and what it raises."""
    outcome: list[T] = []
    failure: list[Exception] = []

    def ask() -> None:
        try:
            _enter(namespace)
            outcome.append(question())
        except Exception as error:  # noqa: BLE001,RUF100 - it belongs to whoever asked
            failure.append(error)

    thread = threading.Thread(target=ask, name="inside-namespace", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _enter(namespace: Path) -> None:
    """For good, and the calling thread alone."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def _dump(kind: int, about: bytes) -> list[bytes]:
    """The bodies of all answers; asked again where the kernel changed something while it answered."""
    for _ in range(_ATTEMPTS):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(_ANSWER_MAX_S)
            kernel.bind((0, 0))
            kernel.send(_HEADER.pack(_HEADER.size + len(about), kind, _DUMP, 1, 0) + about)
            bodies, whole = _answers(kernel, _NEW[kind])
        if whole:
            return bodies
    raise OSError("the host's interfaces or routes change all the time")


def _answers(kernel: socket.socket, kind: int) -> tuple[list[bytes], bool]:
    bodies: list[bytes] = []
    whole = True
    while True:
        for length, answered, flags, body in _messages(kernel.recv(_ANSWER_MAX_BYTES)):
            whole = whole and not flags & _CHANGED_MEANWHILE
            if answered == _DONE:
                return bodies, whole
            if answered == _ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, os.strerror(number))
            if answered == kind and length:
                bodies.append(body)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(length, type, flags, body) of each message."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield length, kind, flags, data[at + _HEADER.size : at + length]
        at += length + 3 & ~3


def _attributes(body: bytes, at: int) -> dict[int, bytes]:
    found = {}
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _KIND_MASK] = body[at + _ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    return found
