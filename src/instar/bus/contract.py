"""What a message bus must do for Instar. Implemented by `memory.py`, `socket.py` and `rabbitmq.py`; all pass tests/bus.

Two patterns: a *command* goes to one queue, is handled by one consumer and answered (or ends at its deadline); an *event*
goes to a topic and reaches every subscriber that is there. A command is acknowledged after its work, so a consumer that
dies leaves it to the next: handlers must stand being called twice. Bodies are bytes: senders encode with msgspec.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec


class Message(msgspec.Struct, frozen=True):
    """`kind` names the record in `body` (its tag and version). `deadline_s` bounds the work from now on.

    `trace` is a W3C traceparent. `epoch` is that of a command which has one. `host`: the host that an event speaks of, in
    whose `body` it stands as the field `host` too; between processes nobody is heard who may not speak of that host."""

    kind: str
    body: bytes
    deadline_s: float = 60.0
    trace: str = ""
    epoch: int = 0
    host: str = ""


class Reply(msgspec.Struct, frozen=True):
    """The answer to a command: `body`, or an error as (code, message, facts) to be made again by `errors.revive`.

    `took_us` is how long the work itself took, in microseconds."""

    body: bytes = b""
    took_us: int = 0
    error: tuple[str, str, dict[str, str | int | float | None]] | None = None


CommandHandler = Callable[[Message], Awaitable[Reply]]
EventHandler = Callable[[Message], Awaitable[None]]


DEAD = "dead"  # instead of a queue's name: the commands that were given up


class NobodyListens(Exception):
    """No consumer serves this queue now."""


class BusAway(Exception):
    """What must not be lost could not be handed over: there is no connection, or it ended meanwhile."""


class ConsumerFailed(Exception):
    """The handler of a command raised in another process; its log has the reason."""


class MessageTooLarge(Exception):
    """Refused before anything of it is sent."""


class DeadLetter(msgspec.Struct, frozen=True):
    """A command that nobody will do any more, without what it says. `reason`: expired (its deadline passed in the queue),
    delivery_limit (its consumers died or failed over it), rejected (no consumer understood it), maxlen. `died_at` is in
    microseconds since the epoch, 0 where unknown."""

    id: str
    kind: str
    queue: str
    reason: str
    died_at: int
    sender: str
    epoch: int


class Subscription(Protocol):
    """A running consumer or subscriber; `cancel` ends it after the message at hand."""

    async def cancel(self) -> None: ...


class Bus(Protocol):
    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def serve(self, queue: str, handler: CommandHandler, *, concurrency_max: int) -> Subscription:
        """Handle commands of `queue`, at most so many at once. Several consumers share one queue."""
        ...

    async def call(self, queue: str, message: Message) -> Reply:
        """Send a command and wait for its reply. Raises TimeoutError at the deadline, NobodyListens at once; the latter
        also as soon as the consumer is gone that had the command, which may then be done in part or whole. A bus whose
        queues outlive their consumers keeps the command for the next one instead, until its deadline: who must not wait so
        long asks elsewhere whether the consumer lives. Raises ConsumerFailed when the handler raised."""
        ...

    async def send(self, queue: str, message: Message) -> None:
        """Send a command without waiting for its reply. Raises NobodyListens, also while the bus itself is away."""
        ...

    async def publish(self, topic: str, message: Message) -> None:
        """Tell an event to every subscriber of `topic`; none is no error."""
        ...

    async def notify(self, topic: str, message: Message) -> None:
        """The same of a notification (model.operation.Notification) for the world outside: returns when it cannot be lost
        any more. Raises BusAway."""
        ...

    async def subscribe(self, topic: str, handler: EventHandler) -> Subscription:
        """Be told events of `topic`, in the order of their publishing. `*` at the end matches any rest."""
        ...

    def listening_s(self) -> float:
        """A clock in seconds that stands still while this process is cut off: only by it does the silence of others mean
        that they are gone."""
        ...

    async def forget(self, queue: str) -> None:
        """Nobody will serve this queue again: what waits in it is dropped, and the queue is gone."""
        ...

    async def waiting(self, queue: str) -> int | None:
        """How many commands wait in the queue for a consumer (DEAD: how many were given up); None where there is no such
        queue, or no telling. Raises BusAway."""
        ...

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The oldest commands that were given up. Raises BusAway."""
        ...

    async def purge_dead_letters(self) -> int:
        """Drop all of them; how many there were. Raises BusAway."""
        ...
