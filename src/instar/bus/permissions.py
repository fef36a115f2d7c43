"""What the user of a host may do at the broker, as RabbitMQ's patterns. Used by `instar admin bus-user` and by tests.

A host serves its own queue, answers, and tells events that end with its own name. It can command nobody, take no other
queue, speak for no other host, and hear no events. The broker enforces it; `rabbitmq_wire.event_topic` holds the name in a
routing key against what the event says.
"""

from __future__ import annotations

import re

import msgspec

from instar.bus import rabbitmq_wire as wire
from instar.model.commands import GUEST_EVENTS, HOST_QUEUE, WORK_PROGRESS
from instar.model.host import HOST_REPORTS

NOTHING = "^$"
_NEVER = "a^"  # matches no routing key, not even an empty one
HOST_EVENTS = (HOST_REPORTS, GUEST_EVENTS, WORK_PROGRESS)


class TopicPermission(msgspec.Struct, frozen=True):
    exchange: str
    write: str
    read: str


class Permissions(msgspec.Struct, frozen=True):
    """As `rabbitmqctl set_permissions` and `set_topic_permissions` take them."""

    configure: str
    write: str
    read: str
    topics: tuple[TopicPermission, ...]


def user_of(host: str) -> str:
    """The name by which the host's agent logs in."""
    wire.check_name(host)
    return HOST_QUEUE + host


def host_permissions(hosts: list[str], *, agent: str = "") -> Permissions:
    """Of an agent that serves these hosts: one, or with `agent`, its name, many that have a queue in common."""
    for host in hosts:
        wire.check_name(host)
    names = _any_of(hosts)
    queues = re.escape(wire.AGENT_QUEUE + agent) if agent else re.escape(HOST_QUEUE) + names
    events = _any_of(list(HOST_EVENTS))
    return Permissions(
        configure=f"^{queues}$",
        # The queue itself and the exchange of dead letters: that is what making and binding a queue asks for.
        write=f"^({queues}|{_any_of([wire.EVENTS, wire.REPLIES, wire.DEAD])})$",
        # An answer needs a queue of its own connection, which the broker names; so does what is said to oneself.
        read=f"^({queues}|{re.escape(wire.COMMANDS)})$",
        topics=(
            TopicPermission(wire.COMMANDS, _NEVER, f"^{re.escape(HOST_QUEUE)}{names}$"),
            TopicPermission(wire.EVENTS, rf"^{events}\.{names}$", _NEVER),
            TopicPermission(wire.DEAD, _NEVER, _NEVER),
            TopicPermission(wire.NOTIFICATIONS, _NEVER, _NEVER),
        ),
    )


def _any_of(names: list[str]) -> str:
    return f"({'|'.join(re.escape(name) for name in names)})"
