"""Frames of messages: how a message becomes some, how they are read in any pieces, and what becomes of broken ones."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pamqp.frame
import pytest
from pamqp import commands, header
from pamqp.body import ContentBody

from instar.bus import amqp_frames as frames
from instar.bus.amqp_lane import Delivered, Lane, LaneChannel
from instar.bus.contract import Message
from instar.bus.rabbitmq_wire import command_properties, received

FRAME_MAX = 4096


def as_the_library_reads(data: bytes) -> list[tuple[int, Any]]:
    found = []
    while data:
        used, channel, frame = pamqp.frame.unmarshal(data)
        found.append((channel, frame))
        data = data[used:]
    return found


def as_the_broker_sends(channel: int, tag: int, key: str, properties: commands.Basic.Properties, body: bytes) -> bytes:
    deliver = commands.Basic.Deliver("consumer", tag, True, "exchange", key)
    parts = [pamqp.frame.marshal(deliver, channel)]
    parts.append(pamqp.frame.marshal(header.ContentHeader(0, len(body), properties), channel))
    pieces = (body[at : at + FRAME_MAX - 8] for at in range(0, len(body), FRAME_MAX - 8))
    parts += [pamqp.frame.marshal(ContentBody(piece), channel) for piece in pieces]
    return b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, FRAME_MAX - 8, FRAME_MAX - 7, 3 * FRAME_MAX])
def test_a_body_of_any_size_goes_in_frames_of_the_size_that_was_agreed(size: int) -> None:
    message = Message("EnsureDisk", b"x" * size, 30.0, "00-trace", 2**40, "host-é")
    properties = command_properties(message, "id", "user", 30.0, "user.secret")
    sent = frames.publish(7, "instar.commands", "host.a", properties, message.body, mandatory=True, frame_max=FRAME_MAX)
    (channel, method), (_, content), *bodies = as_the_library_reads(sent)
    assert channel == 7
    assert (method.exchange, method.routing_key) == ("instar.commands", "host.a")
    assert (method.mandatory, method.immediate) == (True, False)
    assert content.body_size == size
    assert b"".join(one.value for _, one in bodies) == message.body
    assert all(len(one.value) + 8 <= FRAME_MAX for _, one in bodies)
    theirs = content.properties
    assert (theirs.message_type, theirs.message_id, theirs.correlation_id) == ("EnsureDisk", "id", "id")
    assert (theirs.user_id, theirs.reply_to, theirs.expiration, theirs.delivery_mode) == ("user", "user.secret", "30000", 2)
    assert theirs.headers["v"] == 1
    assert theirs.headers["epoch"] == 2**40
    assert theirs.headers["host"] == "host-é"
    assert theirs.headers["deadline_s"] == 30.0


@pytest.mark.parametrize(("key", "headers"), [("k" * 256, {}), ("k", {"epoch": 2**64}), ("k", {"epoch": object()})])
def test_what_amqp_cannot_say_is_refused_before_anything_is_sent(key: str, headers: dict[str, Any]) -> None:
    properties = commands.Basic.Properties(message_type="Test", headers=headers)
    with pytest.raises(ValueError, match=r"exceeds|Unsupported|Unknown"):
        frames.publish(1, "instar.commands", key, properties, b"", mandatory=True, frame_max=FRAME_MAX)


THEIRS = commands.Basic.Properties(
    content_type="text", content_encoding="utf-8", delivery_mode=2, priority=3, correlation_id="c", reply_to="r",
    expiration="9", message_id="m", message_type="Test", user_id="u", app_id="a",
    headers={
        "v": 1, "small": -5, "middle": 300, "unsigned": 40_000, "wide": 70_000, "wider": 3_000_000_000, "widest": 2**50,
        "text": "é" * 300, "yes": True, "none": None, "list": [1, "two"], "table": {"inner": 4}, "deadline_s": 1.5,
        "epoch": 9, "host": "h",
    },
)  # fmt: skip


class Read:
    """A lane on channel 5, what came by it, and what was left for the library."""

    def __init__(self) -> None:
        self.messages: list[Delivered] = []
        self.confirmed: list[tuple[int, bool, bool]] = []
        self.library = asyncio.StreamReader()
        self.lane = Lane(self.library, lambda: None)
        confirm = lambda *one: self.confirmed.append(one)  # noqa: E731
        self.lane.watch(LaneChannel(5, on_delivery=self.messages.append, on_confirm=confirm))

    async def left(self) -> list[tuple[int, Any]]:
        self.library.feed_eof()
        return as_the_library_reads(await self.library.read())


@pytest.mark.parametrize("piece", [1, 7, 8, 100, 1_000_000])
async def test_messages_are_read_in_whatever_pieces_they_come(piece: int) -> None:
    read = Read()
    body = bytes(range(256)) * 40
    qos, ack = commands.Basic.QosOk(), commands.Basic.Ack(17, True)
    data = b"".join(
        (
            pamqp.frame.marshal(qos, 5), as_the_broker_sends(5, 2**40, "host.a", THEIRS, body),
            as_the_broker_sends(6, 1, "other", THEIRS, b"not for the lane"), pamqp.frame.marshal(ack, 5),
            as_the_broker_sends(5, 2, "k", THEIRS, b""),
        )
    )  # fmt: skip
    for at in range(0, len(data), piece):
        read.lane.data_received(data[at : at + piece])
    first, second = read.messages
    assert (first.tag, first.redelivered, first.key, first.body) == (2**40, True, "host.a", body)
    assert (second.tag, second.body) == (2, b"")
    assert read.confirmed == [(17, True, True)]
    properties = first.properties
    assert properties is not None
    assert properties.headers == THEIRS.headers
    assert (properties.message_type, properties.message_id, properties.user_id) == ("Test", "m", "u")
    incoming = received(first)
    assert (incoming.message.kind, incoming.message.epoch, incoming.message.host) == ("Test", 9, "h")
    assert incoming.message.deadline_s == 1.5
    left = [frame for channel, frame in await read.left() if channel]
    assert [type(one) for one in left[:2]] == [commands.Basic.QosOk, commands.Basic.Deliver]
    assert len(left) == 4, "the other channel's message is the library's"


async def test_the_library_hears_that_the_connection_lives_while_the_lane_takes_everything() -> None:
    read = Read()
    read.lane.data_received(as_the_broker_sends(5, 1, "k", THEIRS, b"x"))
    (frame,) = await read.left()
    assert type(frame[1]).__name__ == "Heartbeat"


async def test_a_broker_of_another_protocol_is_the_librarys_business() -> None:
    read = Read()
    read.lane.data_received(b"AMQP\x00\x01\x00\x00")
    read.library.feed_eof()
    assert await read.library.read() == b"AMQP\x00\x01\x00\x00"


def raw(kind: int, payload: bytes, channel: int = 5) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def delivered_with(properties: bytes) -> bytes:
    """A message of four bytes, whose properties (with the flags before them) are these."""
    deliver = pamqp.frame.marshal(commands.Basic.Deliver("c", 7, False, "exchange", "k"), 5)
    return deliver + raw(2, struct.pack(">HHQ", 60, 0, 4) + properties) + raw(3, b"body")


def table(content: bytes) -> bytes:
    return b"\x20\x00" + struct.pack(">I", len(content)) + content


def nested(levels: int) -> bytes:
    inner = b""
    for _ in range(levels):
        inner = b"\x00F" + struct.pack(">I", len(inner)) + inner
    return inner


WHOLE = header.ContentHeader(0, 4, THEIRS).marshal()[12:]
NOT_UNDERSTOOD = {
    "no flags": b"", "a table without an end": b"\x20\x00\xff\xff\xff\xff", "a value of no kind": table(b"\x01nq"),
    "no text": b"\x00\x20\x02\xff\xfe", "a time after all calendars": b"\x00\x40" + b"\xff" * 8,
    "nested beyond reason": table(nested(2000)), "flags without an end": b"\x00\x01" * 30_000,
    "more than is read": table(b"\x00V" * 60_000),
} | {f"cut at {cut}": WHOLE[:cut] for cut in range(1, 48, 4)}  # fmt: skip


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
async def test_properties_that_are_not_understood_are_no_message_of_ours_and_harm_no_other(name: str) -> None:
    read = Read()
    read.lane.data_received(delivered_with(NOT_UNDERSTOOD[name]) + as_the_broker_sends(5, 8, "k", THEIRS, b"next"))
    first, second = read.messages
    assert (first.tag, first.properties, first.body) == (7, None, b"body"), "the broker can be told that it is refused"
    with pytest.raises(ValueError, match="no message"):
        received(first)
    assert received(second).message.body == b"next"


async def test_a_key_that_is_no_text_is_no_message_of_ours() -> None:
    read = Read()
    whole = as_the_broker_sends(5, 9, "kkkk", THEIRS, b"x")
    read.lane.data_received(whole.replace(b"kkkk", b"k\xff\xfek"))
    (message,) = read.messages
    assert (message.tag, message.properties) == (9, None)


BROKEN = {
    "no end": pamqp.frame.marshal(commands.Basic.Ack(1), 5)[:-1] + b"\x00",
    "too long": struct.pack(">BHI", 1, 5, 1 << 30) + b"\x00",
    "a confirmation of nothing": raw(1, b"\x00\x3c\x00\x50\x00"),
    "a delivery without a number": raw(1, b"\x00\x3c\x00\x3c\x01c\x00"),
    "a header without a size": raw(1, b"\x00\x3c\x00\x32") + raw(2, b"\x00\x3c\x00"),
    "a body without a header": raw(1, b"\x00\x3c\x00\x32") + raw(3, b"body"),
    "more than the header says": delivered_with(WHOLE)[:-12] + raw(3, b"bodies"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_frames_that_no_broker_sends_end_the_connection(name: str) -> None:
    lost = asyncio.Event()
    library = asyncio.StreamReader()
    messages: list[Delivered] = []

    def lane() -> Lane:
        made = Lane(library, lost.set)
        made.watch(LaneChannel(5, on_delivery=messages.append, on_confirm=lambda *_: None))
        return made

    async def send(_: asyncio.StreamReader, broker: asyncio.StreamWriter) -> None:
        broker.write(BROKEN[name])
        await broker.drain()
        await lost.wait()
        broker.close()

    server = await asyncio.start_server(send, "127.0.0.1", 0)
    async with server, asyncio.timeout(60):
        transport, _ = await asyncio.get_running_loop().create_connection(lane, *server.sockets[0].getsockname())
        await lost.wait()
        with pytest.raises(ConnectionError):  # the library hears of it
            await library.read()
        transport.close()
    assert messages == []
