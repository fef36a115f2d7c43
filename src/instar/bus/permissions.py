"""What the user of a host may do at the broker, as RabbitMQ's patterns. Used by `instar admin bus-user` and by tests.

A host serves its own queue, answers, tells events that end with its own name, and hears of events only that its own were
heard. It can command nobody, take no other queue, and speak for no other host. The broker enforces it;
`rabbitmq_wire.event_topic` holds the name in a routing key against what the event says.
"""

from __future__ import annotations

import re

import msgspec

from instar.bus import rabbitmq_wire as wire
from instar.bus.rabbitmq_link import user_in
from instar.model.commands import GUEST_EVENTS, HOST_QUEUE, HOSTS_HEARD, WORK_PROGRESS
from instar.model.host import HOST_REPORTS

_NEVER = "a^"  # matches no routing key, not even an empty one
_OWN_QUEUES = r"amq\.gen-[A-Za-z0-9_-]+"
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


def agent_user(agent: str) -> str:
    """The same of an agent of many hosts."""
    wire.check_name(agent)
    return wire.AGENT_QUEUE + agent


def may_speak_for_all(url: str) -> bool:
    """Whether who logs in with this URL may tell events of every host, and of many in one: it is no host's own user."""
    return not user_in(url).startswith((HOST_QUEUE, wire.AGENT_QUEUE))


def host_permissions(hosts: list[str], *, agent: str = "") -> Permissions:
    """Of an agent that serves these hosts: one, or with `agent`, its name, many that have a queue in common."""
    for host in hosts:
        wire.check_name(host)
    names, user = _any_of(hosts), agent_user(agent) if agent else user_of(hosts[0])
    queue = re.escape(wire.AGENT_QUEUE + agent) if agent else re.escape(HOST_QUEUE) + names
    # Queues that the broker names belong to the connection that made them: no other gets at them.
    queues = f"{queue}|{_OWN_QUEUES}"
    return Permissions(
        configure=f"^({queues})$",
        # To make a queue one must be allowed to write to where its dead letters go; what may be written is said below.
        write=f"^({queues}|{_any_of([wire.EVENTS, wire.REPLIES, wire.DEAD])})$",
        read=f"^({queues}|{_any_of([wire.COMMANDS, wire.EVENTS, wire.REPLIES])})$",
        topics=(
            TopicPermission(wire.COMMANDS, _NEVER, f"^{re.escape(HOST_QUEUE)}{names}$"),
            TopicPermission(wire.REPLIES, ".*", rf"^{re.escape(user)}\.[0-9a-f]+$"),
            TopicPermission(
                wire.EVENTS, rf"^{_any_of(list(HOST_EVENTS))}\.{names}$", rf"^{re.escape(HOSTS_HEARD)}{names}\.#$"
            ),
            TopicPermission(wire.DEAD, _NEVER, _NEVER),
            TopicPermission(wire.NOTIFICATIONS, _NEVER, _NEVER),
        ),
    )


def _any_of(names: list[str]) -> str:
    return f"({'|'.join(re.escape(name) for name in names)})"
