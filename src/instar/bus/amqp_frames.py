"""AMQP 0-9-1 on the wire: the few frames that each message needs, as bytes. Used by `amqp_lane.py` and `rabbitmq_wire.py`.

Everything else of the protocol (log-in, channels, queues, bindings) is the library's. These frames are made and read here
because there are a dozen for each command: the library's own objects, queues and tasks for them were the largest part of
what a command cost.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from pamqp import decode

METHOD, HEADER, BODY = 1, 2, 3  # kinds of frames
HEADER_BYTES = 7  # before each frame's payload; one byte comes after it
END = 0xCE
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
DELIVER, RETURN, ACK, NACK = b"\x00\x3c\x00\x3c", b"\x00\x3c\x00\x32", b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x78"
PERSISTENT, TRANSIENT = 2, 1

head = struct.Struct(">BHI").unpack_from  # kind, channel, length of the payload
confirmed = struct.Struct(">QB").unpack_from  # of an ACK or NACK behind its name: number, whether all before it as well
content_size = struct.Struct(">Q").unpack_from

_head = struct.Struct(">BHI").pack
_content = struct.Struct(">HHQ").pack
_settled = struct.Struct(">BHIHHQBB").pack
_tag = struct.Struct(">QB").unpack_from
_long = struct.Struct(">I")
_PUBLISH = b"\x00\x3c\x00\x28\x00\x00"
_BASIC, _ACK, _REJECT, _NACK = 60, 80, 90, 120
_NUMBERS = {
    ord("b"): struct.Struct(">b"), ord("B"): struct.Struct(">B"), ord("s"): struct.Struct(">h"),
    ord("u"): struct.Struct(">H"), ord("I"): struct.Struct(">i"), ord("i"): struct.Struct(">I"),
    ord("l"): struct.Struct(">q"), ord("L"): struct.Struct(">q"), ord("f"): struct.Struct(">f"),
    ord("d"): struct.Struct(">d"),
}  # fmt: skip
_int_value = struct.Struct(">cq").pack
_float_value = struct.Struct(">cd").pack


class Properties(msgspec.Struct, frozen=True):
    """What a message has besides its body. Empty texts stand for what is not there."""

    content_type: str = ""
    content_encoding: str = ""
    headers: dict[str, Any] | None = None
    delivery_mode: int = 0
    priority: int | None = None
    correlation_id: str = ""
    reply_to: str = ""
    expiration: str = ""
    message_id: str = ""
    timestamp: int = 0  # seconds since the epoch
    kind: str = ""  # AMQP's `type`
    user_id: str = ""
    app_id: str = ""


class Delivered(msgspec.Struct):
    """A message from the broker. `properties` is None where they are not understood. `tag` 0: one that came back."""

    tag: int
    redelivered: bool
    key: str
    properties: Properties | None
    body: bytes


# --- from us --------------------------------------------------------------------------------------------------------


def encode_properties(has: Properties) -> bytes:
    """Raises ValueError for texts that are too long."""
    flags, parts = 0, []
    if has.content_type:
        flags |= 0x8000
        parts.append(_short(has.content_type))
    if has.content_encoding:
        flags |= 0x4000
        parts.append(_short(has.content_encoding))
    if has.headers is not None:
        flags |= 0x2000
        parts.append(_table(has.headers))
    if has.delivery_mode:
        flags |= 0x1000
        parts.append(bytes((has.delivery_mode,)))
    if has.priority is not None:
        flags |= 0x0800
        parts.append(bytes((has.priority,)))
    if has.correlation_id:
        flags |= 0x0400
        parts.append(_short(has.correlation_id))
    if has.reply_to:
        flags |= 0x0200
        parts.append(_short(has.reply_to))
    if has.expiration:
        flags |= 0x0100
        parts.append(_short(has.expiration))
    if has.message_id:
        flags |= 0x0080
        parts.append(_short(has.message_id))
    if has.timestamp:
        flags |= 0x0040
        parts.append(has.timestamp.to_bytes(8, "big"))
    if has.kind:
        flags |= 0x0020
        parts.append(_short(has.kind))
    if has.user_id:
        flags |= 0x0010
        parts.append(_short(has.user_id))
    if has.app_id:
        flags |= 0x0008
        parts.append(_short(has.app_id))
    return flags.to_bytes(2, "big") + b"".join(parts)


def publish(
    channel: int, exchange: str, key: str, properties: Properties, body: bytes, *, mandatory: bool, frame_max: int
) -> bytes:
    """All frames of one message. `frame_max` in bytes, as agreed with the broker. Raises ValueError."""
    method = b"".join((_PUBLISH, _short(exchange), _short(key), b"\x01" if mandatory else b"\x00"))
    header = _content(_BASIC, 0, len(body)) + encode_properties(properties)
    frames = [
        _head(METHOD, channel, len(method)), method, b"\xce", _head(HEADER, channel, len(header)), header, b"\xce",
    ]  # fmt: skip
    piece_max = frame_max - HEADER_BYTES - 1
    for start in range(0, len(body), piece_max):
        piece = body[start : start + piece_max]
        frames += (_head(BODY, channel, len(piece)), piece, b"\xce")
    return b"".join(frames)


def ack(channel: int, tag: int) -> bytes:
    return _settled(METHOD, channel, 13, _BASIC, _ACK, tag, 0, END)


def reject(channel: int, tag: int) -> bytes:
    """It becomes a dead letter."""
    return _settled(METHOD, channel, 13, _BASIC, _REJECT, tag, 0, END)


def requeue(channel: int, tag: int) -> bytes:
    """It goes back into its queue, where it is counted how often that happened."""
    return _settled(METHOD, channel, 13, _BASIC, _NACK, tag, 2, END)


def _short(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > 255:
        raise ValueError("longer than AMQP takes")
    return bytes((len(encoded),)) + encoded


def _table(headers: dict[str, Any]) -> bytes:
    parts = []
    for name, value in headers.items():
        parts.append(_short(name))
        if isinstance(value, str):
            encoded = value.encode()
            parts += (b"S", _long.pack(len(encoded)), encoded)
        elif isinstance(value, float):
            parts.append(_float_value(b"d", value))
        elif isinstance(value, int):
            parts.append(_int_value(b"l", value))
        else:
            raise ValueError(f"the header {name} is neither a text nor a number")
    table = b"".join(parts)
    return _long.pack(len(table)) + table


# --- from the broker ------------------------------------------------------------------------------------------------


def delivery(method: bytes) -> tuple[int, bool, str]:
    """Of the payload of a DELIVER: tag, whether it came before, routing key."""
    at = 5 + method[4]
    tag, redelivered = _tag(method, at)
    at += 9
    at += 1 + method[at]
    return tag, redelivered & 1 == 1, method[at + 1 : at + 1 + method[at]].decode(errors="replace")


def decode_properties(header: bytes) -> Properties | None:
    """Of a HEADER frame's payload. None for what is not understood: others may write into our queues, too."""
    try:
        return _decode_properties(header)
    except (ValueError, IndexError, struct.error, OverflowError):
        return None


def _decode_properties(header: bytes) -> Properties:
    flags, at = header[12] << 8 | header[13], 14
    if flags & 0x0003:
        raise ValueError("properties that AMQP 0-9-1 does not have")
    found: dict[str, Any] = {}
    for bit, name in _TEXTS_FIRST:
        if flags & bit:
            found[name], at = _text_at(header, at)
    if flags & 0x2000:
        end = at + 4 + _long.unpack_from(header, at)[0]
        found["headers"], at = _headers(header, at + 4, end), end
    if flags & 0x1000:
        found["delivery_mode"], at = header[at], at + 1
    if flags & 0x0800:
        found["priority"], at = header[at], at + 1
    for bit, name in _TEXTS_MIDDLE:
        if flags & bit:
            found[name], at = _text_at(header, at)
    if flags & 0x0040:
        found["timestamp"], at = int.from_bytes(header[at : at + 8], "big"), at + 8
    for bit, name in _TEXTS_LAST:
        if flags & bit:
            found[name], at = _text_at(header, at)
    if at > len(header):
        raise ValueError("shorter than it says")
    return Properties(**found)


_TEXTS_FIRST = ((0x8000, "content_type"), (0x4000, "content_encoding"))
_TEXTS_MIDDLE = ((0x0400, "correlation_id"), (0x0200, "reply_to"), (0x0100, "expiration"), (0x0080, "message_id"))
_TEXTS_LAST = ((0x0020, "kind"), (0x0010, "user_id"), (0x0008, "app_id"))


def _text_at(data: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + data[at]
    return data[at + 1 : end].decode(), end


def _headers(data: bytes, at: int, end: int) -> dict[str, Any]:
    """Values of other kinds than ours (a broker's own headers) are read by the library."""
    headers: dict[str, Any] = {}
    if end > len(data):
        raise ValueError("shorter than it says")
    while at < end:
        name, at = _text_at(data, at)
        kind = data[at]
        at += 1
        if (number := _NUMBERS.get(kind)) is not None:
            headers[name] = number.unpack_from(data, at)[0]
            at += number.size
        elif kind == 0x53:  # S: a text
            text_end = at + 4 + _long.unpack_from(data, at)[0]
            headers[name], at = data[at + 4 : text_end].decode(errors="replace"), text_end
        else:
            used, headers[name] = decode.embedded_value(data[at - 1 : end])
            at += used - 1
    return headers
