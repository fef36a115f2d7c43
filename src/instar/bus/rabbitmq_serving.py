"""Commands for this process: the queues that it consumes, each command's way to its acknowledgement. Used by `rabbitmq.py`.

A command is acknowledged after its handler's work; where somebody waits, after the broker has the reply. One that is not
comes again: with the next connection, or to the next consumer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from instar.bus import rabbitmq_wire as wire
from instar.bus.amqp_confirms import LinkLost
from instar.bus.amqp_lane import Delivered
from instar.bus.contract import CommandHandler
from instar.bus.rabbitmq_link import Link, QueueStuck, Taken, or_lost
from instar.bus.rabbitmq_work import Answer, Served, Work
from instar.config import RabbitMqSettings
from instar.model.commands import HOST_QUEUE

log = structlog.get_logger()

HOLD_FAILED_S = 1.0  # a command that nobody waits for and whose handler failed is tried again after so long
STUCK_MAX = 2


class Serving:
    """What `serve` returns."""

    def __init__(self, served: Served, end: Callable[[], Awaitable[None]]) -> None:
        self.queue = served.queue
        self._end = end

    async def cancel(self) -> None:
        await self._end()


class Consumers:
    """`link` is that of now. `shared_queue`: all hosts that this process serves have it in common. `changing` is held by
    whoever changes what is served or heard, and while a new connection learns of it."""

    def __init__(self, settings: RabbitMqSettings, shared_queue: str, link: Callable[[], Link | None]) -> None:
        self.changing = asyncio.Lock()
        self._link = link
        self._shared = _Consumer(shared_queue, settings.prefetch_max) if shared_queue else None
        self._consumers: list[_Consumer] = []
        self._work = Work(settings.message_max_bytes)

    async def close(self) -> None:
        """The work at hand ends, which the broker gives to the next."""
        await self._work.close()

    async def serve(self, queue: str, handler: CommandHandler, concurrency_max: int) -> Serving:
        """Returns when the broker sends commands here; while it is away at once, and it will when it is back."""
        wire.check_name(queue)
        served = Served(queue, handler, concurrency_max)
        async with self.changing:
            shares = self._shared is not None and queue.startswith(HOST_QUEUE)
            consumer = self._shared if shares and self._shared else _Consumer(queue, concurrency_max)
            consumer.served.setdefault(queue, []).append(served)
            link = self._link()
            with contextlib.suppress(LinkLost):
                if consumer not in self._consumers:
                    self._consumers.append(consumer)
                    if link is not None:
                        await self._start(link, consumer)
                elif link is not None:
                    await or_lost(link, link.bind(consumer.queue, queue))
        return Serving(served, lambda: self._end(consumer, served))

    async def connected(self, link: Link) -> None:
        """Everything comes by this connection from now on. Who calls holds `changing`. Raises LinkLost."""
        for consumer in self._consumers:
            await self._start(link, consumer)

    def disconnected(self) -> None:
        for consumer in self._consumers:
            consumer.end = None

    async def _start(self, link: Link, consumer: _Consumer) -> None:
        serving = link.serve(consumer.queue, list(consumer.served), consumer.prefetch, partial(self._came, consumer))
        try:
            consumer.end = await or_lost(link, serving)
            consumer.stuck = 0
        except QueueStuck as error:
            # RabbitMQ 3.10 forgets what it had of a queue that was made less than two seconds before the broker was
            # killed, and then leaves the queue without a leader for ever. Nothing is lost by making it anew.
            consumer.stuck += 1
            log.warning("bus.queue_stuck", queue=consumer.queue, times=consumer.stuck)
            if consumer.stuck >= STUCK_MAX:
                consumer.stuck = 0
                await or_lost(link, link.delete_queue(consumer.queue))
            link.lose()
            raise LinkLost from error

    async def _end(self, consumer: _Consumer, served: Served) -> None:
        """No more commands come here; the queue stays, for who comes next."""
        async with self.changing:
            servers = consumer.served.get(served.queue, [])
            if served in servers:
                servers.remove(served)
            if not servers:
                consumer.served.pop(served.queue, None)
            if not consumer.served and consumer in self._consumers:
                self._consumers.remove(consumer)
                if consumer.end is not None:
                    await consumer.end()

    # --- from a command's delivery to its acknowledgement -----------------------------------------------------------

    def _came(self, consumer: _Consumer, taken: Taken, delivered: Delivered) -> None:
        tag = delivered.tag
        try:
            incoming = wire.received(delivered)
        except ValueError:
            log.warning("bus.command_refused", queue=consumer.queue, why="it is no message of this cloud")
            taken.reject(tag)
            return
        if incoming.version > wire.VERSION:
            kind = incoming.message.kind
            log.warning("bus.command_refused", queue=consumer.queue, kind=kind, version=incoming.version)
            if incoming.reply_to:
                self._reply(incoming, (wire.FAILED, b"this process is older than the command"), lambda _: None)
            taken.reject(tag)
            return
        settle = partial(self._settle, incoming, taken, tag)
        servers = consumer.served.get(incoming.key)
        if servers:
            self._work.begin(incoming.id, servers[0], incoming.message, settle)
        else:  # an agent of many hosts that has just begun does not serve each of them yet
            settle((wire.NOBODY, b"nobody serves this queue"))

    def _settle(self, incoming: wire.Incoming, taken: Taken, tag: int, answer: Answer) -> None:
        if incoming.reply_to:
            # Only a reply that the broker has lets go of the command: else it comes again, and finds its answer kept.
            self._reply(incoming, answer, lambda problem: taken.ack(tag) if problem is None else None)
        elif answer[0] in (wire.FAILED, wire.NOBODY):
            asyncio.get_running_loop().call_later(HOLD_FAILED_S, taken.requeue, tag)
        else:
            taken.ack(tag)

    def _reply(self, incoming: wire.Incoming, answer: Answer, then: Callable[[Exception | None], None]) -> None:
        def told(problem: Exception | None) -> None:
            if problem is not None:
                log.info("bus.reply_dropped", kind=incoming.message.kind, why="the broker is away")
            then(problem)

        link = self._link()
        if link is None:
            told(LinkLost())
            return
        kind, body = answer
        properties = wire.answer_properties(kind, incoming.id, link.user)
        link.publish_soon(wire.REPLIES, incoming.reply_to, body, properties, told)


class _Consumer:
    """A queue of the broker that this process consumes: of one serving, or of all that it serves."""

    def __init__(self, queue: str, prefetch: int) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.served: dict[str, list[Served]] = {}
        self.end: Callable[[], Awaitable[None]] | None = None
        self.stuck = 0
