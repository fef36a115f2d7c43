"""A bus that counts and times what goes over it. Put around the real one where a process is put together."""

from __future__ import annotations

import time

from instar.bus.contract import (
    Bus,
    CommandHandler,
    DeadLetter,
    EventHandler,
    Message,
    NobodyListens,
    Reply,
    Subscription,
)
from instar.metrics import numbers


class MeteredBus:
    """Implements `Bus` by another one."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def open(self) -> None:
        await self._bus.open()

    async def close(self) -> None:
        await self._bus.close()

    async def serve(self, queue: str, handler: CommandHandler, *, concurrency_max: int) -> Subscription:
        async def counted(message: Message) -> Reply:
            numbers.command_began(queue)
            try:
                return await handler(message)
            finally:
                numbers.command_ended(queue)

        return await self._bus.serve(queue, counted, concurrency_max=concurrency_max)

    async def call(self, queue: str, message: Message) -> Reply:
        began = time.perf_counter()
        result = "failed"
        numbers.call_began(queue)
        try:
            reply = await self._bus.call(queue, message)
            result = "error" if reply.error is not None else "ok"
            return reply
        except TimeoutError:
            result = "timeout"
            raise
        except NobodyListens:
            result = "nobody"
            raise
        finally:
            numbers.call_ended(queue, result, time.perf_counter() - began)

    async def send(self, queue: str, message: Message) -> None:
        await self._bus.send(queue, message)

    async def publish(self, topic: str, message: Message) -> None:
        numbers.event_told()
        await self._bus.publish(topic, message)

    async def notify(self, topic: str, message: Message) -> None:
        await self._bus.notify(topic, message)

    def listening_s(self) -> float:
        return self._bus.listening_s()

    async def forget(self, queue: str) -> None:
        await self._bus.forget(queue)

    async def waiting(self, queue: str) -> int | None:
        return await self._bus.waiting(queue)

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        return await self._bus.dead_letters(limit)

    async def purge_dead_letters(self) -> int:
        return await self._bus.purge_dead_letters()

    async def subscribe(self, topic: str, handler: EventHandler) -> Subscription:
        async def counted(message: Message) -> None:
            numbers.event_heard()
            await handler(message)

        return await self._bus.subscribe(topic, counted)
