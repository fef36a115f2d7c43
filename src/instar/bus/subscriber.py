"""One subscriber's events: waiting in order, handled one after another, bounded. Used by every bus of this room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from instar.bus.contract import EventHandler, Message

log = structlog.get_logger()

EVENTS_WAITING_MAX = 10_000  # events that a slow subscriber may have before the oldest are dropped


class Subscriber:
    """Runs from its making until `cancel`, which calls `forget` first. A handler that fails hears the next event."""

    def __init__(self, topic: str, handler: EventHandler, forget: Callable[[Subscriber], None]) -> None:
        self.topic = topic
        self._handler = handler
        self._forget = forget
        self._waiting: asyncio.Queue[Message] = asyncio.Queue(EVENTS_WAITING_MAX)
        self._task = asyncio.create_task(self._run(), name=f"subscriber {topic}")

    def put(self, message: Message) -> None:
        if self._waiting.full():
            self._waiting.get_nowait()
            log.warning("bus.event_dropped", topic=self.topic, waiting=EVENTS_WAITING_MAX)
        self._waiting.put_nowait(message)

    async def _run(self) -> None:
        while True:
            message = await self._waiting.get()
            try:
                await self._handler(message)
            except Exception:
                log.exception("bus.subscriber_failed", topic=self.topic, kind=message.kind)

    async def cancel(self) -> None:
        if not self._task.done():
            self._forget(self)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)  # who is cancelled while it waits here hears of it
