"""Messages as frames: what the library (pamqp) writes and reads of them, and what becomes of what it cannot read. Used by
`amqp_lane.py`, and by who sends over a lane."""

from __future__ import annotations

import contextlib
import struct
from functools import lru_cache

from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.constants import FRAME_HEADER_SIZE
from pamqp.header import ContentHeader

PERSISTENT, TRANSIENT = 2, 1
PROPERTIES_MAX_BYTES = 16 << 10  # the time to read some grows with the square of their size: 10 ms for these, at worst
_SIZE_BYTES = 12  # of a header: what comes before the properties


def publish(
    channel: int, exchange: str, key: str, properties: Basic.Properties, body: bytes, *, mandatory: bool, frame_max: int
) -> bytes:
    """All frames of one message. `frame_max` in bytes, as agreed with the broker. Raises ValueError for what AMQP cannot
    say."""
    try:
        frames = [_route(channel, exchange, key, mandatory)]
        frames.append(frame.marshal(ContentHeader(0, len(body), properties), channel))
    except (TypeError, OverflowError, struct.error) as error:
        raise ValueError(str(error)) from error
    piece_max = frame_max - FRAME_HEADER_SIZE - 1
    for start in range(0, len(body), piece_max):
        frames.append(frame.marshal(ContentBody(body[start : start + piece_max]), channel))
    return b"".join(frames)


@lru_cache(maxsize=1024)
def _route(channel: int, exchange: str, key: str, mandatory: bool) -> bytes:
    return frame.marshal(Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory), channel)


def confirmed(arguments: bytes) -> tuple[int, bool]:
    """Of an Ack or Nack, which have this in common: number, whether all before it as well. Raises ConnectionError."""
    read = Basic.Ack()
    try:
        read.unmarshal(arguments)
    except (ValueError, struct.error) as error:
        raise ConnectionError("the broker sent a confirmation that cannot be read") from error
    return read.delivery_tag, read.multiple


def delivery(arguments: bytes) -> tuple[int, bool, str | None]:
    """Of a Deliver: tag, whether it came before, routing key; None for a key that is no text, which others may choose.
    Raises ConnectionError."""
    read, key = Basic.Deliver(), None
    with contextlib.suppress(ValueError, struct.error):
        read.unmarshal(arguments)
        key = read.routing_key
    if read.delivery_tag is None:  # it is read before all that others may choose
        raise ConnectionError("the broker sent a delivery that cannot be read")
    return read.delivery_tag, read.redelivered, key


def content(header: bytes) -> tuple[int, Basic.Properties | None]:
    """Of a header frame: the body's size in bytes, and the properties; None for those that are not understood: others may
    write into our queues, too. Raises ConnectionError."""
    read = ContentHeader()
    try:
        read.unmarshal(header if len(header) <= PROPERTIES_MAX_BYTES else header[:_SIZE_BYTES])
    except Exception as error:  # more than the library says: a table that is nested too deeply, for one
        if read.class_id is None:
            raise ConnectionError("the broker sent a header that cannot be read") from error
        return read.body_size, None
    return read.body_size, read.properties
