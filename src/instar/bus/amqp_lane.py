"""The connection to a broker, with a lane of its own for messages. Used by `rabbitmq_link.py`.

The library (aiormq, below aio-pika) logs in, opens channels, declares and consumes; it reads and writes this connection as
any other. Of channels that are told to the lane, the frames that each message needs do not reach it: they are picked out of
the stream here as soon as they come, and what they say is handed on without a queue or a task between. What is written here
goes out once per turn of the event loop, in as few packets as possible; whole frames always, so that both may write. How a
frame is written and read is the library's own (pamqp, by `amqp_frames.py`); here is only where it ends, and whose it is.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
import structlog
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from pamqp.commands import Basic
from pamqp.constants import FRAME_BODY, FRAME_END, FRAME_HEADER, FRAME_HEADER_SIZE, FRAME_METHOD
from pamqp.heartbeat import Heartbeat
from yarl import URL

from instar.bus import amqp_frames as frames

log = structlog.get_logger()

FRAME_MAX_BYTES = 16 << 20  # agreed upon is much less: what says more is no frame
BUFFER_MAX_BYTES = 1 << 20  # not yet taken by the broker: who sends more waits
SHOW_LIFE_EVERY_S = 1.0
LINGER_S = 0.005
_PROTOCOL_HEADER = ord("A")  # "AMQP…": a broker that speaks another version says so, and ends
_HEARTBEAT = Heartbeat().marshal()
_DELIVER, _RETURN, _ACK, _NACK = (
    one.index.to_bytes(4, "big") for one in (Basic.Deliver, Basic.Return, Basic.Ack, Basic.Nack)
)
_head = struct.Struct(">BHI").unpack_from  # kind, channel, length of what follows before the last byte


class Delivered(msgspec.Struct):
    """A message from the broker. `properties` is None where they, or the key, are not understood. `tag` 0: one that came
    back."""

    tag: int
    redelivered: bool
    key: str
    properties: Basic.Properties | None
    body: bytes


OnDelivery = Callable[[Delivered], None]
OnConfirm = Callable[[int, bool, bool], None]


class LaneChannel:
    """A channel whose messages go over the lane. `on_delivery`: a message came, or (tag 0) came back because no queue is
    bound for it. `on_confirm`: number, whether all before it as well, whether the broker keeps it. Neither may raise."""

    def __init__(self, number: int, *, on_delivery: OnDelivery, on_confirm: OnConfirm | None = None) -> None:
        self.number = number
        self._on_delivery = on_delivery
        self._on_confirm = on_confirm
        self._begun: tuple[int, bool, str | None] | None = None
        self._properties: Basic.Properties | None = None
        self._missing_bytes = 0
        self._pieces: list[bytes] = []

    def take(self, kind: int, payload: bytes) -> bool:
        """Whether the frame was one for the lane. Raises ConnectionError for one that a broker does not send."""
        if kind == FRAME_METHOD:
            name = payload[:4]
            if name in (_DELIVER, _RETURN):
                self._begun = frames.delivery(payload[4:]) if name == _DELIVER else (0, False, "")
                self._properties, self._missing_bytes, self._pieces = None, 0, []
                return True
            if self._on_confirm is not None and name in (_ACK, _NACK):
                number, all_before = frames.confirmed(payload[4:])
                self._on_confirm(number, all_before, name == _ACK)
                return True
            return False
        if self._begun is None:
            return False
        if kind == FRAME_HEADER:
            self._missing_bytes, self._properties = frames.content(payload)
        elif kind == FRAME_BODY:
            self._pieces.append(payload)
            self._missing_bytes -= len(payload)
            if self._missing_bytes < 0:
                raise ConnectionError("the broker sent more of a message than there is")
        else:
            return False
        if not self._missing_bytes:
            self._complete(*self._begun)
        return True

    def _complete(self, tag: int, redelivered: bool, key: str | None) -> None:
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        delivered = Delivered(tag, redelivered, key or "", self._properties if key is not None else None, body)
        self._begun, self._properties, self._pieces = None, None, []
        self._on_delivery(delivered)


class Lane(asyncio.StreamReaderProtocol):
    """Between the socket and the library. `heard_at`: when the last message came, in seconds of the monotonic clock."""

    def __init__(self, reader: asyncio.StreamReader, on_lost: Callable[[], None]) -> None:
        super().__init__(reader)
        self.heard_at = time.monotonic()
        self._reader = reader
        self._on_lost = on_lost
        self._socket: asyncio.Transport | None = None
        self._turns = asyncio.get_running_loop()
        self._channels: dict[int, LaneChannel] = {}
        self._rest = b""
        self._no_frames = False
        self._showed_life_at = 0.0
        self._outgoing: list[bytes] = []
        self._flushes = False  # at the end of this turn

    # --- in ---------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._socket = cast(asyncio.Transport, transport)  # the loop's own class is none of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._outgoing.clear()
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        """What raises here ends the connection."""
        if self._no_frames:
            self._reader.feed_data(data)
            return
        if self._rest:
            data = self._rest + data
        at, end, for_us = 0, len(data), False
        while end - at > FRAME_HEADER_SIZE:
            kind, number, length = _head(data, at)
            if kind == _PROTOCOL_HEADER:
                self._no_frames = True
                self._reader.feed_data(data[at:])
                return
            if length > FRAME_MAX_BYTES:
                raise ConnectionError("the broker sent what is no frame")
            after = at + FRAME_HEADER_SIZE + length + 1
            if after > end:
                break
            if data[after - 1] != FRAME_END:
                raise ConnectionError("the broker sent what is no frame")
            channel = self._channels.get(number)
            if channel is not None and channel.take(kind, data[at + FRAME_HEADER_SIZE : after - 1]):
                for_us = True
            else:
                self._reader.feed_data(data[at:after])
            at = after
        self._rest = data[at:]
        if for_us:
            self.heard_at = time.monotonic()
            if self.heard_at - self._showed_life_at > SHOW_LIFE_EVERY_S:
                # A broker that sends messages sends no heartbeats, and the library sees neither.
                self._showed_life_at = self.heard_at
                self._reader.feed_data(_HEARTBEAT)

    def watch(self, channel: LaneChannel) -> None:
        """From now on. Before the channel consumes anything."""
        self._channels[channel.number] = channel

    # --- out --------------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Whole frames, in the order of the calls. Raises ConnectionError where the connection is at its end."""
        if self._socket is None or self._socket.is_closing():
            raise ConnectionResetError("the connection to the broker ended")
        if not self._flushes:
            self._flushes = True
            self._turns.call_soon(self._flush)
        self._outgoing.append(data)

    def write_with_the_next(self, data: bytes) -> None:
        """The same for what nobody waits for: it goes out with what is written next, or a moment later."""
        if self._socket is None or self._socket.is_closing():
            raise ConnectionResetError("the connection to the broker ended")
        if not self._outgoing:
            self._turns.call_later(LINGER_S, self._flush)
        self._outgoing.append(data)

    def _flush(self) -> None:
        self._flushes = False
        if not self._outgoing:
            return
        outgoing, self._outgoing = self._outgoing, []
        if self._socket is not None and not self._socket.is_closing():
            self._socket.write(b"".join(outgoing))

    @property
    def is_full(self) -> bool:
        """The broker does not take what was sent: `drained` first, then write."""
        return self._socket is not None and self._socket.get_write_buffer_size() > BUFFER_MAX_BYTES

    async def drained(self) -> None:
        """Raises ConnectionError."""
        if self._socket is not None:
            await asyncio.StreamWriter(self._socket, self, self._reader, self._turns).drain()


class LaneFactory(TransportFactory):
    """How the library connects. `lane` is that of the connection which it made last. `on_lost` is called at its end."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self.lane: Lane | None = None
        self._on_lost = on_lost

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        provider = kwargs.pop("ssl_context_provider", None)
        context = await provider.get_context() if url.scheme == "amqps" else None
        host, port = url.host, url.port
        assert host is not None
        assert port is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        lane = Lane(reader, self._on_lost)
        try:
            transport, _ = await loop.create_connection(lambda: lane, host, port, ssl=context, **kwargs)
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        self.lane = lane
        return reader, asyncio.StreamWriter(transport, lane, reader, loop)
