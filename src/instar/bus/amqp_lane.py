"""The connection to a broker, with a lane of its own for messages. Used by `rabbitmq_link.py`.

The library (aiormq, below aio-pika) logs in, opens channels, declares and consumes; it reads and writes this connection as
any other. Of channels that are told to the lane, the frames that each message needs do not reach it: they are read here as
soon as they come, and handed on without a queue or a task between. What is written here goes out once per turn of the event
loop, in as few packets as possible; whole frames always, so that both may write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import structlog
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from yarl import URL

from instar.bus import amqp_frames as frames

log = structlog.get_logger()

FRAME_MAX_BYTES = 16 << 20  # agreed upon is much less: what says more is no frame
BUFFER_MAX_BYTES = 1 << 20  # not yet taken by the broker: who sends more waits
SHOW_LIFE_EVERY_S = 1.0
LINGER_S = 0.005
_PROTOCOL_HEADER = ord("A")  # "AMQP…": a broker that speaks another version says so, and ends

OnDelivery = Callable[[frames.Delivered], None]
OnConfirm = Callable[[int, bool, bool], None]


class LaneChannel:
    """A channel whose messages go over the lane. `on_delivery`: a message came, or (tag 0) came back because no queue is
    bound for it. `on_confirm`: number, whether all before it as well, whether the broker keeps it. Neither may raise."""

    def __init__(self, number: int, *, on_delivery: OnDelivery, on_confirm: OnConfirm | None = None) -> None:
        self.number = number
        self._on_delivery = on_delivery
        self._on_confirm = on_confirm
        self._method: bytes | None = None
        self._header = b""
        self._missing_bytes = 0
        self._pieces: list[bytes] = []

    def take(self, kind: int, payload: bytes) -> bool:
        """Whether the frame was one for the lane."""
        if kind == frames.METHOD:
            name = payload[:4]
            if name in (frames.DELIVER, frames.RETURN):
                self._method = payload
                return True
            if name in (frames.ACK, frames.NACK) and self._on_confirm is not None:
                number, bits = frames.confirmed(payload, 4)
                self._on_confirm(number, bits & 1 == 1, name == frames.ACK)
                return True
            return False
        if self._method is None:
            return False
        if kind == frames.HEADER:
            self._header, self._pieces = payload, []
            self._missing_bytes = frames.content_size(payload, 4)[0]
        elif kind == frames.BODY:
            self._pieces.append(payload)
            self._missing_bytes -= len(payload)
        else:
            return False
        if self._missing_bytes <= 0:
            self._complete(self._method)
        return True

    def _complete(self, method: bytes) -> None:
        tag, redelivered, key = frames.delivery(method) if method[:4] == frames.DELIVER else (0, False, "")
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        properties = frames.decode_properties(self._header)
        self._method, self._header, self._pieces = None, b"", []
        self._on_delivery(frames.Delivered(tag, redelivered, key, properties, body))


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
        while end - at > frames.HEADER_BYTES:
            kind, number, length = frames.head(data, at)
            if kind == _PROTOCOL_HEADER:
                self._no_frames = True
                self._reader.feed_data(data[at:])
                return
            if length > FRAME_MAX_BYTES:
                raise ConnectionError("the broker sent what is no frame")
            after = at + frames.HEADER_BYTES + length + 1
            if after > end:
                break
            channel = self._channels.get(number)
            if channel is not None and channel.take(kind, data[at + frames.HEADER_BYTES : after - 1]):
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
                self._reader.feed_data(frames.HEARTBEAT)

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
