"""The bus inside one process: a command is a function call behind a semaphore, an event a queue for each subscriber."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

import structlog

from instar.bus.contract import CommandHandler, DeadLetter, EventHandler, Message, NobodyListens, Reply
from instar.bus.subscriber import Subscriber

log = structlog.get_logger()


class MemoryBus:
    def __init__(self) -> None:
        self._consumers: dict[str, list[_Consumer]] = {}
        self._subscribers: dict[str, list[Subscriber]] = defaultdict(list)
        self._work: set[asyncio.Task[Reply]] = set()

    async def open(self) -> None:
        return

    async def close(self) -> None:
        """Ends subscribers, and the work that nobody waits for any more."""
        for subscribers in list(self._subscribers.values()):
            for subscriber in list(subscribers):
                await subscriber.cancel()
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    async def serve(self, queue: str, handler: CommandHandler, *, concurrency_max: int) -> _Consumer:
        consumers = self._consumers.setdefault(queue, [])
        consumer = _Consumer(handler, concurrency_max, lambda c: self._forget(queue, c))
        consumers.append(consumer)
        return consumer

    def _forget(self, queue: str, consumer: _Consumer) -> None:
        consumers = self._consumers.get(queue, [])
        if consumer in consumers:
            consumers.remove(consumer)
        if not consumers:
            self._consumers.pop(queue, None)

    def _start(self, queue: str, message: Message) -> asyncio.Task[Reply]:
        consumers = self._consumers.get(queue)
        if not consumers:
            raise NobodyListens(queue)
        consumer = min(consumers, key=lambda c: c.busy)
        consumers.remove(consumer)  # of those that are as busy, the one that had nothing for longest is the next
        consumers.append(consumer)
        task = asyncio.ensure_future(consumer.handle(message))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def call(self, queue: str, message: Message) -> Reply:
        # The work goes on when the caller is cancelled or late, as it would on the other side of a network.
        async with asyncio.timeout(message.deadline_s):
            return await asyncio.shield(self._start(queue, message))

    async def send(self, queue: str, message: Message) -> None:
        self._start(queue, message).add_done_callback(_log_failure)

    async def publish(self, topic: str, message: Message) -> None:
        for subscriber in self._subscribers.get(topic, ()):
            subscriber.put(message)
        for pattern, subscribers in self._subscribers.items():
            if pattern.endswith("*") and topic.startswith(pattern[:-1]):
                for subscriber in subscribers:
                    subscriber.put(message)

    async def notify(self, topic: str, message: Message) -> None:
        """There is no world outside: who hears it is in this process."""
        await self.publish(topic, message)

    def listening_s(self) -> float:
        return time.monotonic()

    async def forget(self, queue: str) -> None:
        """A queue is no more than its consumers."""

    async def waiting(self, queue: str) -> int | None:
        return sum(max(0, one.busy - one.concurrency_max) for one in self._consumers.get(queue, ()))

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        return []

    async def purge_dead_letters(self) -> int:
        return 0

    async def subscribe(self, topic: str, handler: EventHandler) -> Subscriber:
        subscriber = Subscriber(topic, handler, lambda s: self._subscribers[topic].remove(s))
        self._subscribers[topic].append(subscriber)
        return subscriber


class _Consumer:
    def __init__(self, handler: CommandHandler, concurrency_max: int, forget: Callable[[_Consumer], None]) -> None:
        self._handler = handler
        self._slots = asyncio.Semaphore(concurrency_max)
        self.concurrency_max = concurrency_max
        self._forget = forget
        self.busy = 0

    async def handle(self, message: Message) -> Reply:
        self.busy += 1
        try:
            async with self._slots:
                return await self._handler(message)
        finally:
            self.busy -= 1

    async def cancel(self) -> None:
        self._forget(self)


def _log_failure(task: asyncio.Task[Reply]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("bus.command_failed", exc_info=task.exception())
