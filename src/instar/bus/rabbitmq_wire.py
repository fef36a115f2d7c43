"""What Instar's messages look like in AMQP: names of exchanges and queues, properties, headers. Used by `rabbitmq.py`.

A message's body is its record as the sender encoded it. What else there is to it stands in properties and headers, so
that a broker's own tools show it: type (the kind), message-id, user-id (which the broker holds against who is logged in),
expiration; headers `v`, `deadline_s`, `expires_at` (whole seconds since the epoch), `epoch`, `trace`, `host`. Headers that
are not known are left alone; a higher `v` is one that this version does not understand.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import msgspec
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from instar.bus.amqp_frames import PERSISTENT, TRANSIENT
from instar.bus.amqp_lane import Delivered
from instar.bus.contract import DeadLetter, Message, Reply
from instar.config import RabbitMqSettings
from instar.model.commands import HOST_QUEUE

VERSION = 1

COMMANDS = "instar.commands"  # topic exchange; routing key: the queue of the contract
EVENTS = "instar.events"  # topic exchange; routing key: the topic, and the host that is spoken of
REPLIES = "instar.replies"  # topic exchange; routing key: the user who waits, and a secret of theirs
DEAD = "instar.dead"  # topic exchange; only the broker itself may publish to it
DEAD_LETTERS = "instar.dead-letters"
NOTIFICATIONS = "nova"  # topic exchange: where consumers of OpenStack's notifications look
EXCHANGES = (COMMANDS, EVENTS, REPLIES, DEAD)  # topic exchanges: their routing keys can be permitted one by one

AGENT_QUEUE = "agent."  # + the name of an agent of many hosts
EVENTS_WAITING_MAX = 10_000  # in the broker, for a process that is slow to take them
COMMANDS_WAITING_MAX = 100_000  # in one queue; more are refused
REPLY, FAILED, NOBODY, PING = "Reply", "ConsumerFailed", "NobodyListens", "Ping"  # types of answers
_CONTENT_TYPE = "application/x-msgpack"
_PUNCTUATION = frozenset("*#")  # words that a binding would take for any

_encode = msgspec.msgpack.Encoder().encode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


class Incoming(msgspec.Struct, frozen=True):
    """A command or event as it came. `version` higher than ours: nothing else of it may be relied on."""

    id: str
    message: Message
    key: str
    reply_to: str
    sender: str
    version: int
    redelivered: bool


class _HostOf(msgspec.Struct, frozen=True):
    host: str = ""


_decode_host = msgspec.msgpack.Decoder(_HostOf).decode


def check_name(name: str) -> None:
    """Raises ValueError for a queue or host that would be taken for several."""
    if not name or _PUNCTUATION & set(name) or len(name.encode()) > 200:
        raise ValueError(f"{name!r} cannot be the name of a queue")


def command_properties(message: Message, id_: str, user: str, left_s: float, reply_to: str) -> Basic.Properties:
    """Of a command that is good for `left_s` more seconds: then the broker takes it out of its queue."""
    headers = _headers(message)
    headers["deadline_s"], headers["expires_at"] = float(left_s), round(time.time() + left_s)
    return Basic.Properties(
        content_type=_CONTENT_TYPE, message_type=message.kind, message_id=id_, correlation_id=id_, user_id=user,
        reply_to=reply_to, expiration=str(max(1, round(left_s * 1000))), delivery_mode=PERSISTENT, app_id="instar",
        headers=headers,
    )  # fmt: skip


def event_properties(message: Message, id_: str, user: str) -> Basic.Properties:
    return Basic.Properties(
        content_type=_CONTENT_TYPE, message_type=message.kind, message_id=id_, user_id=user, delivery_mode=TRANSIENT,
        app_id="instar", headers=_headers(message),
    )  # fmt: skip


def _headers(message: Message) -> dict[str, Any]:
    headers: dict[str, Any] = {"v": VERSION}
    if message.epoch:
        headers["epoch"] = message.epoch
    if message.trace:
        headers["trace"] = message.trace
    if message.host:
        headers["host"] = message.host
    return headers


def event_key(topic: str, host: str) -> str:
    return f"{topic}.{host}" if host else topic


def event_binding(topic: str) -> str:
    """What of the exchange an event's subscriber may need; `heard` tells the rest."""
    words = topic[:-1].rpartition(".")[0] if topic.endswith("*") else topic
    return f"{words}.#" if words else "#"


def event_topic(incoming: Incoming) -> str | None:
    """The topic of an event, or None for one that may not be believed. The broker has checked who the sender is, and lets
    an agent use only routing keys that end with its host's name: so that name must be the one in the event."""
    host, sender = incoming.message.host, incoming.sender
    if not host:
        return incoming.key if sender and not sender.startswith((HOST_QUEUE, AGENT_QUEUE)) else None
    if not sender or not incoming.key.endswith(f".{host}"):
        return None
    if sender.startswith(HOST_QUEUE) and sender != HOST_QUEUE + host:
        return None
    try:
        spoken_of = _decode_host(incoming.message.body).host
    except msgspec.MsgspecError:
        return None
    return incoming.key[: -len(host) - 1] if spoken_of == host else None


def received(delivered: Delivered) -> Incoming:
    """Raises ValueError for what is no message of Instar's."""
    properties = delivered.properties
    if properties is None:
        raise ValueError("no message of this cloud")
    headers = properties.headers or {}
    version = headers.get("v")
    if not isinstance(version, int) or not properties.message_type or not properties.message_id:
        raise ValueError("no message of this cloud")
    deadline_s, epoch = headers.get("deadline_s", 60.0), headers.get("epoch", 0)
    message = Message(
        properties.message_type,
        delivered.body,
        float(deadline_s) if isinstance(deadline_s, int | float) else 60.0,
        _text(headers.get("trace")),
        epoch if isinstance(epoch, int) else 0,
        _text(headers.get("host")),
    )
    return Incoming(
        properties.message_id, message, delivered.key, properties.reply_to or "", properties.user_id or "", version,
        delivered.redelivered,
    )  # fmt: skip


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


# --- answers --------------------------------------------------------------------------------------------------------


def answer_properties(kind: str, id_: str, user: str) -> Basic.Properties:
    return Basic.Properties(
        content_type=_CONTENT_TYPE, message_type=kind, message_id=id_, correlation_id=id_, user_id=user,
        delivery_mode=TRANSIENT, app_id="instar", headers={"v": VERSION},
    )  # fmt: skip


def encode_reply(reply: Reply) -> bytes:
    return _encode(reply)


def decode_reply(body: bytes) -> Reply:
    """Raises msgspec.MsgspecError."""
    return _decode_reply(body)


# --- queues ---------------------------------------------------------------------------------------------------------


def queue_arguments(queue: str, settings: RabbitMqSettings) -> dict[str, Any]:
    """Of a queue of commands. An agent's queue goes when its agent has been gone for long."""
    arguments: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-delivery-limit": settings.delivery_limit,
        "x-dead-letter-exchange": DEAD,
        "x-max-length": COMMANDS_WAITING_MAX,
        "x-overflow": "reject-publish",
    }
    if queue.startswith((HOST_QUEUE, AGENT_QUEUE)):
        arguments["x-expires"] = settings.queue_unused_s * 1000
    return arguments


def dead_letters_arguments(settings: RabbitMqSettings) -> dict[str, Any]:
    return {"x-queue-type": "quorum", "x-max-length": settings.dead_letters_max, "x-overflow": "drop-head"}


def dead_letter(delivered: DeliveredMessage) -> DeadLetter:
    """Why and where it died is told by the broker's own header."""
    properties = delivered.header.properties
    headers = properties.headers or {}
    deaths = headers.get("x-death")
    death = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    when, epoch = death.get("time"), headers.get("epoch", 0)
    return DeadLetter(
        id=properties.message_id or "",
        kind=properties.message_type or "",
        queue=_text(death.get("queue")) or delivered.routing_key or "",
        reason=_text(death.get("reason")),
        died_at=round(when.timestamp() * 1_000_000) if isinstance(when, datetime) else 0,
        sender=properties.user_id or "",
        epoch=epoch if isinstance(epoch, int) else 0,
    )
