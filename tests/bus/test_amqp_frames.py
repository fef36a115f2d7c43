"""Frames of messages: what we write the library reads, and the reverse, in whatever pieces it comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pamqp.frame
import pytest
from pamqp import commands, header
from pamqp.body import ContentBody

from instar.bus import amqp_frames as frames
from instar.bus.amqp_lane import Lane, LaneChannel
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
def test_a_message_of_ours_is_what_the_library_reads(size: int) -> None:
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


def test_what_is_said_of_a_delivery_is_what_the_library_reads() -> None:
    (_, ack), (_, reject), (_, nack) = as_the_library_reads(
        frames.ack(3, 2**33) + frames.reject(3, 5) + frames.requeue(3, 6)
    )
    assert isinstance(ack, commands.Basic.Ack)
    assert (ack.delivery_tag, ack.multiple) == (2**33, False)
    assert isinstance(reject, commands.Basic.Reject)
    assert (reject.delivery_tag, reject.requeue) == (5, False)
    assert isinstance(nack, commands.Basic.Nack)
    assert (nack.delivery_tag, nack.multiple, nack.requeue) == (6, False, True)


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
        self.messages: list[frames.Delivered] = []
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
    assert (properties.kind, properties.message_id, properties.user_id) == ("Test", "m", "u")
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


@pytest.mark.parametrize("cut", range(12, 60, 3))
def test_properties_that_are_not_understood_are_no_message_of_ours(cut: int) -> None:
    whole = header.ContentHeader(0, 4, THEIRS).marshal()
    properties = frames.decode_properties(whole[:cut])
    assert properties is None
    with pytest.raises(ValueError, match="no message"):
        received(frames.Delivered(1, False, "k", properties, b""))
