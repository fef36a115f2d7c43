"""What goes over the socket between a bus and a process beside it: frames of msgpack, each with its length before it.

Used by `socket.py` (the process beside) and `socket_server.py` (the owner of the bus), and by nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from instar.bus.contract import Message, Reply

VERSION = 1
FRAME_MAX_BYTES = 32 << 20
_LENGTH_BYTES = 4


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The first frame of a client. Another version is not spoken to."""

    version: int


class Serve(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From the client: commands of `queue` are welcome. `id` is this serving's, chosen by the client."""

    id: int
    queue: str
    concurrency_max: int


class Subscribe(msgspec.Struct, frozen=True, tag=True, array_like=True):
    id: int
    topic: str


class Cancel(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From the client: the serving or subscription with this id ends."""

    id: int
    ends: int


class Publish(msgspec.Struct, frozen=True, tag=True, array_like=True):
    topic: str
    message: Message


class Call(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From the client: a command for a queue of whoever serves it. Not `answered`: nobody waits for its reply."""

    id: int
    queue: str
    message: Message
    answered: bool = True


class Command(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """To the client: a command for the queue that it serves as `serving`. `id` is chosen by the server."""

    id: int
    serving: int
    message: Message


class Event(msgspec.Struct, frozen=True, tag=True, array_like=True):
    subscription: int
    message: Message


class Answer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """To a call or a command; without `reply` to everything else that has an id."""

    id: int
    reply: Reply | None = None


class Refusal(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`reason`: nobody (listens), late (after its deadline), failed (its handler raised)."""

    id: int
    reason: str
    text: str = ""


Frame = Hello | Serve | Subscribe | Cancel | Publish | Call | Command | Event | Answer | Refusal
_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class FrameTooLarge(Exception):
    """A message of more than FRAME_MAX_BYTES: refused before anything of it is sent."""


class Channel:
    """One connection. `send` may be called by many at once; `receive` by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, frame: Frame) -> None:
        """Raises FrameTooLarge, and ConnectionError when the other side is gone."""
        data = _encode(frame)
        if len(data) > FRAME_MAX_BYTES:
            raise FrameTooLarge(f"{len(data)} bytes")
        if self._writer.is_closing():  # uvloop would raise RuntimeError
            raise ConnectionResetError("the other side is gone")
        self._writer.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
        await self._writer.drain()

    async def receive(self) -> Frame | None:
        """None at the end of the connection, and for what is no frame: then there is nothing more to be understood."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
            if length > FRAME_MAX_BYTES:
                return None
            return _decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            return None

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """An address for `path` however long it is: the kernel takes 107 bytes. Valid inside the block. Raises OSError."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def unix_socket() -> socket.socket:
    """One that never blocks, and whose name in the file system is for its owner alone."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    os.fchmod(made.fileno(), 0o600)  # the name inherits it at `bind`, so there is no moment at which others may connect
    return made
