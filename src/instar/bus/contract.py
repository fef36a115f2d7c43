"""What a message bus must do for Instar. Implemented by `memory.py` and `socket.py`; both pass tests/bus.

Two patterns: a *command* goes to one queue, is handled by one consumer and answered (or ends at its deadline); an *event*
goes to a topic and reaches every subscriber that is there. A command is acknowledged after its work, so a consumer that
dies leaves it to the next: handlers must stand being called twice. Bodies are bytes: senders encode with msgspec.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec


class Message(msgspec.Struct, frozen=True):
    """`kind` names the record in `body` (its tag and version). `deadline_s` bounds the work from now on."""

    kind: str
    body: bytes
    deadline_s: float = 60.0
    trace: str = ""


class Reply(msgspec.Struct, frozen=True):
    """The answer to a command: `body`, or an error as (code, message, facts) to be made again by `errors.revive`.

    `took_us` is how long the work itself took, in microseconds."""

    body: bytes = b""
    took_us: int = 0
    error: tuple[str, str, dict[str, str | int | float | None]] | None = None


CommandHandler = Callable[[Message], Awaitable[Reply]]
EventHandler = Callable[[Message], Awaitable[None]]


class NobodyListens(Exception):
    """No consumer serves this queue now."""


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
        also as soon as the consumer is gone that had the command, which may then be done in part or whole."""
        ...

    async def send(self, queue: str, message: Message) -> None:
        """Send a command without waiting for its reply. Raises NobodyListens."""
        ...

    async def publish(self, topic: str, message: Message) -> None:
        """Tell an event to every subscriber of `topic`; none is no error."""
        ...

    async def subscribe(self, topic: str, handler: EventHandler) -> Subscription:
        """Be told events of `topic`, in the order of their publishing. `*` at the end matches any rest."""
        ...
