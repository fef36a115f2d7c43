"""What the two sides of a stream say to each other: messages of msgpack, each after its length, over one TLS connection.

The server speaks first (`Hello`): a client whose certificate was refused learns it there, before it has sent anything. Then
`OpenFile` or `OpenSocket`, answered by `Accepted` or `Refused`. A file comes as `Cell`s, each followed by its bytes, and an
`End`. A socket's bytes go both ways as frames of a length and as many bytes; length 0 says that this direction has ended,
which TLS itself cannot say without ending the other one as well.
"""

from __future__ import annotations

import socket
import ssl
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from instar.streams.sparse import CELL_BYTES, CHECKSUM_BYTES, EXTENTS_MAX, FileFacts

PROTOCOL = 1
NAME_MAX = 255
MESSAGE_MAX_BYTES = 32_768
HANDSHAKE_MAX_S = 10.0
IDLE_MAX_S = 60.0  # a file stream that says nothing for so long is broken
ALIVE_EVERY_S = 10.0

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=NAME_MAX)]
Checksum: TypeAlias = Annotated[bytes, Meta(min_length=CHECKSUM_BYTES, max_length=CHECKSUM_BYTES)]
InCell: TypeAlias = Annotated[int, Meta(ge=0, le=CELL_BYTES)]


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    protocol: int


class OpenFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="file"):
    """`start` cells of the file are there already, of a source that was as `known` and with the digest `prefix`."""

    name: Name
    start: Annotated[int, Meta(ge=0)] = 0
    prefix: bytes = b""
    known: FileFacts | None = None


class OpenSocket(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="socket"):
    name: Name


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="accepted"):
    """Of a file: what it is now, and from which cell on it comes (0: from the beginning, whatever was asked)."""

    facts: FileFacts | None = None
    start: int = 0


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """`not granted`: or no longer, or to another. `unavailable`: it cannot be opened. `changed`: while it was sent."""

    reason: Literal["not granted", "unavailable", "changed"]


class Alive(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="alive"):
    """Still at it: hashing what the client has, or waiting for its share of the bandwidth."""


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cell"):
    """As many bytes follow as the extents (offset in the cell, length) have in sum."""

    index: Annotated[int, Meta(ge=0)]
    extents: Annotated[list[tuple[InCell, InCell]], Meta(min_length=1, max_length=EXTENTS_MAX)]
    checksum: Checksum


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="end"):
    digest: Checksum


Message: TypeAlias = Hello | OpenFile | OpenSocket | Accepted | Refused | Alive | Cell | End

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class WireError(Exception):
    """The connection is lost, or the other side said what it must not say. Its words may be shown to users; the cause is
    the socket's own error."""

    @classmethod
    def of(cls, error: OSError) -> WireError:
        if isinstance(error, TimeoutError):
            return cls("there was no answer in time")
        if isinstance(error, ConnectionRefusedError):
            return cls("nothing listens there")
        return cls("the connection was lost")


def prepare(plain: socket.socket) -> None:
    """Options of every TCP connection: a peer that vanished is noticed within about a minute, also when nothing is sent."""
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(IDLE_MAX_S * 1000))


def send(secure: ssl.SSLSocket, message: Message, payload: bytes | bytearray = b"") -> None:
    """Raises WireError."""
    encoded = _encoder.encode(message)
    try:
        secure.sendall(len(encoded).to_bytes(4, "big") + encoded)
        if payload:
            secure.sendall(payload)
    except OSError as error:
        raise WireError.of(error) from error


def receive(secure: ssl.SSLSocket) -> Message:
    """The next message. Raises WireError."""
    header = bytearray(4)
    receive_into(secure, memoryview(header))
    length = int.from_bytes(header, "big")
    if length > MESSAGE_MAX_BYTES:
        raise WireError("a message is too long")
    encoded = bytearray(length)
    receive_into(secure, memoryview(encoded))
    try:
        return _decoder.decode(encoded)
    except msgspec.MsgspecError as error:
        raise WireError("a message makes no sense") from error


def receive_into(secure: ssl.SSLSocket, view: memoryview) -> None:
    """Fill `view`. Raises WireError, also when the connection ends before."""
    while view:
        try:
            got = secure.recv_into(view)
        except OSError as error:
            raise WireError.of(error) from error
        if not got:
            raise WireError("the connection was lost")
        view = view[got:]
