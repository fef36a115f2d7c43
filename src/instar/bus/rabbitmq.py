"""The bus contract on RabbitMQ: for clouds of many processes. Made by `opening.py`; why it is so: decision 0014.

A command goes to a quorum queue and is acknowledged after its handler's work; its reply goes to a queue that lives as long
as the caller's connection. When the connection was lost, everything served and heard is so again with the next one, and
whoever waits for a reply asks again with the same id. Events are not kept: who is not connected does not hear them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

import aiormq.exceptions
import msgspec
import structlog
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel

from instar.bus import rabbitmq_wire as wire
from instar.bus.contract import (
    DEAD,
    BusAway,
    CommandHandler,
    ConsumerFailed,
    DeadLetter,
    EventHandler,
    Message,
    MessageTooLarge,
    NobodyListens,
    Reply,
)
from instar.bus.notification_form import notification_form
from instar.bus.rabbitmq_link import TROUBLE, Link, LinkLost, Overfull, QueueStuck, Unroutable, address, user_in
from instar.bus.rabbitmq_work import Served, Work
from instar.bus.subscriber import Subscriber
from instar.config import RabbitMqSettings
from instar.model.commands import HOST_QUEUE

log = structlog.get_logger()

FIRST_CONNECT_MAX_S = 10.0
SET_UP_MAX_S = 60.0  # of all that is served and heard, on a broker that has just begun
SEND_MAX_S = 5.0  # the broker may take so long to promise that it keeps a command
NOTIFY_MAX_S = 10.0
COME_BACK_S = 5.0  # after a connection was lost: others come back as well, and until then a queue may be missing
QUIET_MAX_S = 2.0  # without a word for so long, not even our own, nobody's silence means anything
SILENT_HEARTBEATS = 3
AGAIN_S = 0.25
HOLD_FAILED_S = 1.0  # a command that nobody waits for and whose handler failed is tried again after so long
STUCK_MAX = 2
LIVED_WELL_S = 5.0
DEAD_LETTERS_SHOWN_MAX = 500

T = TypeVar("T")


class RabbitMqBus:
    """`url` as in the setting `bus`. `shared_queue`: all hosts that this process serves have this one queue in common, for
    agents of very many. `name` is what the broker shows for the connection."""

    def __init__(self, url: str, settings: RabbitMqSettings, *, shared_queue: str = "", name: str = "instar") -> None:
        self._url = url
        self._settings = settings
        self._shared = _Consumer(shared_queue, settings.prefetch_max) if shared_queue else None
        self._name = name
        self._replies_key = f"{user_in(url)}.{secrets.token_hex(16)}"
        self._link: Link | None = None
        self._linked = asyncio.Event()
        self._tried = asyncio.Event()
        self._heard_at = time.monotonic()
        self._deaf_s = 0.0  # for so long in all it heard nothing
        self._listens_from = float("-inf")
        self._lost_before = False
        self._keeper: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # what is served and heard
        self._consumers: list[_Consumer] = []
        self._subscribers: list[Subscriber] = []
        self._waiting: dict[str, asyncio.Future[Reply | None]] = {}
        self._work = Work(settings.message_max_bytes)
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life -------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect. While the broker is away this returns after a few seconds and goes on trying. Raises StartupError for
        settings that cannot be used."""
        self._keeper = asyncio.create_task(self._keep_connected(), name="bus connection")
        tried = asyncio.create_task(self._tried.wait())
        await asyncio.wait((self._keeper, tried), timeout=FIRST_CONNECT_MAX_S, return_when=asyncio.FIRST_COMPLETED)
        tried.cancel()
        if self._keeper.done():
            self._keeper.result()

    async def close(self) -> None:
        """Ends subscribers, and the work at hand, which the broker gives to the next."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for subscriber in list(self._subscribers):
            await subscriber.cancel()
        if self._link is not None:
            await self._link.close()
        self._unlink()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._work.close()

    def listening_s(self) -> float:
        return time.monotonic() - self._deaf_s - max(0.0, time.monotonic() - self._heard_at - QUIET_MAX_S)

    def _heard(self) -> None:
        """Something came. What was told to nobody meanwhile is told again by those who tell: they get time to come back."""
        now = time.monotonic()
        if now >= self._listens_from:
            self._deaf_s += max(0.0, now - self._heard_at - QUIET_MAX_S)
            self._heard_at = now

    async def _listen_to_ourselves(self, link: Link) -> None:
        """A connection may be cut without a word: what we say to ourselves by way of the broker shows that it is not."""
        heartbeat_s = self._settings.heartbeat_s
        overslept = False
        while not link.gone.done():
            # Who was stopped, or had no processor, has not read yet what came meanwhile.
            if not overslept and time.monotonic() - link.heard_at > heartbeat_s * SILENT_HEARTBEATS:
                log.warning("bus.silent", broker=address(self._url))
                link.lose()
                return
            properties = wire.answer_properties(wire.PING, "ping", link.user)
            with contextlib.suppress(LinkLost):
                await link.tell(wire.REPLIES, self._replies_key, b"", properties)
            slept_from = time.monotonic()
            await asyncio.sleep(heartbeat_s / 2)
            overslept = time.monotonic() - slept_from > heartbeat_s

    async def _keep_connected(self) -> None:
        settings = self._settings
        pause_s, said = settings.reconnect_min_s, ""
        while True:
            try:
                link = await self._connect()
                self._tried.set()
                if said or self._lost_before:
                    log.info("bus.connected", broker=address(self._url))
                said = ""
                self._spawn(self._listen_to_ourselves(link))
                await asyncio.shield(link.gone)
                log.warning("bus.connection_lost", broker=address(self._url))
                if time.monotonic() - link.since > LIVED_WELL_S:
                    pause_s = settings.reconnect_min_s
            except (TimeoutError, LinkLost, *TROUBLE) as error:
                # Not the text of every error: one may hold more of the URL than belongs into a log.
                about_channel = isinstance(error, aiormq.exceptions.AMQPChannelError)
                reason = str(error) if about_channel else type(error).__name__
                tell = log.debug if reason == said else log.warning
                tell("bus.not_connected", broker=address(self._url), reason=reason)
                said = reason
            self._unlink()
            self._tried.set()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 -- so that not all come at once
            pause_s = min(pause_s * 2, settings.reconnect_max_s)

    async def _connect(self) -> Link:
        link = await Link.open(
            self._url, self._settings, name=self._name,
            replies_key=self._replies_key, on_reply=self._on_reply, on_event=self._on_event,
        )  # fmt: skip
        try:
            async with asyncio.timeout(SET_UP_MAX_S), self._changing:
                self._link = link
                if self._lost_before:
                    self._listens_from = time.monotonic() + COME_BACK_S
                for binding in {wire.event_binding(one.topic) for one in self._subscribers}:
                    await link.hear(binding)
                for consumer in self._consumers:
                    await self._start(link, consumer)
        except BaseException:
            await link.close()
            raise
        self._linked.set()
        return link

    def _unlink(self) -> None:
        """Whoever waits for a reply asks again: nobody knows whether it is still on its way."""
        if self._link is not None:
            self._lost_before = True
        self._link = None
        self._linked.clear()
        for consumer in self._consumers:
            consumer.end = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(None)

    # --- commands: who sends them -------------------------------------------------------------------------------------

    async def call(self, queue: str, message: Message) -> Reply:
        self._check_size(message)
        id_, ends = secrets.token_hex(16), time.monotonic() + message.deadline_s
        try:
            async with asyncio.timeout(message.deadline_s):
                while True:
                    await self._linked.wait()
                    answer: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
                    self._waiting[id_] = answer
                    if await self._ask(queue, message, id_, ends) and (reply := await answer) is not None:
                        return reply
        finally:
            self._waiting.pop(id_, None)

    async def _ask(self, queue: str, message: Message, id_: str, ends: float) -> bool:
        """Whether the command is on its way; if not, try again. Raises NobodyListens."""
        link = self._link
        if link is None:
            return False
        properties = wire.command_properties(message, id_, link.user, ends - time.monotonic(), self._replies_key)
        try:
            await link.publish(wire.COMMANDS, queue, message.body, properties, mandatory=True)
        except Unroutable:
            if not self._lost_before or time.monotonic() - link.since > COME_BACK_S:
                raise NobodyListens(queue) from None
            await asyncio.sleep(AGAIN_S)
            return False
        except Overfull:
            await asyncio.sleep(AGAIN_S)
            return False
        except LinkLost:
            await asyncio.sleep(0)
            return False
        return True

    async def send(self, queue: str, message: Message) -> None:
        self._check_size(message)
        link = self._link
        if link is None:
            raise NobodyListens("the broker is away")
        properties = wire.command_properties(message, secrets.token_hex(16), link.user, message.deadline_s, None)
        try:
            async with asyncio.timeout(SEND_MAX_S):
                await link.publish(wire.COMMANDS, queue, message.body, properties, mandatory=True)
        except (Unroutable, Overfull, LinkLost, TimeoutError) as error:
            raise NobodyListens(queue) from error

    async def _on_reply(self, _: Channel, delivered: DeliveredMessage) -> None:
        self._heard()
        properties = delivered.header.properties
        answer = self._waiting.get(properties.correlation_id or "")
        if answer is None or answer.done():
            return  # it was late, or asked for twice
        if properties.message_type == wire.REPLY:
            try:
                answer.set_result(wire.decode_reply(bytes(delivered.body)))
            except msgspec.MsgspecError:
                answer.set_exception(ConsumerFailed("the reply is not understood"))
        elif properties.message_type == wire.NOBODY:
            answer.set_exception(NobodyListens(bytes(delivered.body).decode(errors="replace")))
        else:
            answer.set_exception(ConsumerFailed(bytes(delivered.body).decode(errors="replace")))

    def _check_size(self, message: Message) -> None:
        if len(message.body) > self._settings.message_max_bytes:
            raise MessageTooLarge(f"{len(message.body)} bytes")

    # --- commands: who does them --------------------------------------------------------------------------------------

    async def serve(self, queue: str, handler: CommandHandler, *, concurrency_max: int) -> _Serving:
        """Returns when the broker sends commands here; while it is away at once, and it will when it is back."""
        wire.check_name(queue)
        served = Served(queue, handler, concurrency_max)
        async with self._changing:
            shares = self._shared is not None and queue.startswith(HOST_QUEUE)
            consumer = self._shared if shares and self._shared else _Consumer(queue, concurrency_max)
            consumer.served.setdefault(queue, []).append(served)
            link = self._link
            with contextlib.suppress(LinkLost):
                if consumer not in self._consumers:
                    self._consumers.append(consumer)
                    if link is not None:
                        await self._start(link, consumer)
                elif link is not None:
                    await _or_lost(link, link.bind(consumer.queue, queue))
        return _Serving(served, lambda: self._end(consumer, served))

    async def _start(self, link: Link, consumer: _Consumer) -> None:
        async def on_delivery(channel: Channel, delivered: DeliveredMessage) -> None:
            self._spawn(self._handle(consumer, channel, delivered))

        serving = link.serve(consumer.queue, list(consumer.served), consumer.prefetch, on_delivery)
        try:
            consumer.end = await _or_lost(link, serving)
            consumer.stuck = 0
        except QueueStuck as error:
            # RabbitMQ 3.10 forgets what it had of a queue that was made less than two seconds before the broker was
            # killed, and then leaves the queue without a leader for ever. Nothing is lost by making it anew.
            consumer.stuck += 1
            log.warning("bus.queue_stuck", queue=consumer.queue, times=consumer.stuck)
            if consumer.stuck >= STUCK_MAX:
                consumer.stuck = 0
                await _or_lost(link, link.delete_queue(consumer.queue))
            link.lose()
            raise LinkLost from error

    async def _end(self, consumer: _Consumer, served: Served) -> None:
        """No more commands come here; the queue stays, for who comes next."""
        async with self._changing:
            servers = consumer.served.get(served.queue, [])
            if served in servers:
                servers.remove(served)
            if not servers:
                consumer.served.pop(served.queue, None)
            if not consumer.served and consumer in self._consumers:
                self._consumers.remove(consumer)
                if consumer.end is not None:
                    await consumer.end()

    async def _handle(self, consumer: _Consumer, channel: Channel, delivered: DeliveredMessage) -> None:
        """From a command's delivery to its acknowledgement. When the connection is lost it comes again."""
        tag = delivered.delivery_tag or 0
        with contextlib.suppress(*TROUBLE):
            try:
                incoming = wire.received(delivered)
            except ValueError:
                log.warning("bus.command_refused", queue=consumer.queue, why="it is no message of this cloud")
                await channel.basic_reject(tag, requeue=False)
                return
            if incoming.version > wire.VERSION:
                kind = incoming.message.kind
                log.warning("bus.command_refused", queue=consumer.queue, kind=kind, version=incoming.version)
                await self._reply(incoming, (wire.FAILED, b"this process is older than the command"))
                await channel.basic_reject(tag, requeue=False)
                return
            servers = consumer.served.get(incoming.key)
            answer = (
                await self._work.answer(incoming.id, servers[0], incoming.message)
                if servers
                # An agent of many hosts that has just begun does not serve each of them yet.
                else (wire.NOBODY, b"nobody serves this queue")
            )
            if answer[0] in (wire.FAILED, wire.NOBODY) and not incoming.reply_to:
                await asyncio.sleep(HOLD_FAILED_S)
                await channel.basic_nack(tag, requeue=True)
                return
            # Only a reply that the broker has lets go of the command: else it comes again, and finds its answer kept.
            if not incoming.reply_to or await self._reply(incoming, answer):
                await channel.basic_ack(tag)

    async def _reply(self, incoming: wire.Incoming, answer: tuple[str, bytes]) -> bool:
        link = self._link
        if link is None or not incoming.reply_to:
            return False
        kind, body = answer
        try:
            properties = wire.answer_properties(kind, incoming.id, link.user)
            await link.publish(wire.REPLIES, incoming.reply_to, body, properties, mandatory=False)
        except (LinkLost, Overfull, QueueStuck, NobodyListens):
            log.info("bus.reply_dropped", kind=incoming.message.kind, why="the broker is away")
            return False
        return True

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- events -------------------------------------------------------------------------------------------------------

    async def publish(self, topic: str, message: Message) -> None:
        self._check_size(message)
        link = self._link
        if link is None:
            log.debug("bus.event_dropped", topic=topic, why="the broker is away")
            return
        properties = wire.event_properties(message, secrets.token_hex(8), link.user)
        with contextlib.suppress(LinkLost):
            await link.tell(wire.EVENTS, wire.event_key(topic, message.host), message.body, properties)

    async def notify(self, topic: str, message: Message) -> None:
        """In the form that consumers of OpenStack's versioned notifications read; none of them is no error."""
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        key, body, properties = notification_form(message, link.user)
        try:
            async with asyncio.timeout(NOTIFY_MAX_S):
                await link.publish(wire.NOTIFICATIONS, key, body, properties, mandatory=False)
        except (LinkLost, Overfull, QueueStuck, NobodyListens, TimeoutError) as error:
            raise BusAway("the broker did not promise to keep it") from error

    async def subscribe(self, topic: str, handler: EventHandler) -> Subscriber:
        """Returns when events come here; while the broker is away at once, and they will when it is back."""
        subscriber = Subscriber(topic, handler, self._forget_subscriber)
        async with self._changing:
            self._subscribers.append(subscriber)
            link = self._link
            if link is not None:
                with contextlib.suppress(LinkLost):
                    await _or_lost(link, link.hear(wire.event_binding(topic)))
        return subscriber

    def _forget_subscriber(self, subscriber: Subscriber) -> None:
        if subscriber not in self._subscribers:
            return
        self._subscribers.remove(subscriber)
        binding = wire.event_binding(subscriber.topic)
        link = self._link
        if link is not None and all(wire.event_binding(one.topic) != binding for one in self._subscribers):
            self._spawn(self._unbind(link, binding))

    async def _unbind(self, link: Link, binding: str) -> None:
        async with self._changing:
            if all(wire.event_binding(one.topic) != binding for one in self._subscribers):
                with contextlib.suppress(*TROUBLE):
                    await link.hear_no_more(binding)

    async def _on_event(self, _: Channel, delivered: DeliveredMessage) -> None:
        self._heard()
        try:
            incoming = wire.received(delivered)
        except ValueError:
            return
        topic = wire.event_topic(incoming)
        if topic is None:
            log.warning("bus.event_refused", key=incoming.key, sender=incoming.sender, why="it speaks of another host")
            return
        if incoming.version > wire.VERSION:
            log.debug("bus.event_refused", key=incoming.key, version=incoming.version)
            return
        for subscriber in self._subscribers:
            pattern = subscriber.topic
            if pattern == topic or (pattern.endswith("*") and topic.startswith(pattern[:-1])):
                subscriber.put(incoming.message)

    # --- for admins -----------------------------------------------------------------------------------------------------

    async def forget(self, queue: str) -> None:
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        try:
            await _or_lost(link, link.delete_queue(queue))
        except LinkLost as error:
            raise BusAway("the connection was lost") from error

    async def waiting(self, queue: str) -> int | None:
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        try:
            return await _or_lost(link, link.waiting(wire.DEAD_LETTERS if queue == DEAD else queue))
        except LinkLost as error:
            raise BusAway("the connection was lost") from error

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        try:
            found = await _or_lost(link, link.dead_letters(min(limit, DEAD_LETTERS_SHOWN_MAX)))
        except LinkLost as error:
            raise BusAway("the connection was lost") from error
        return [wire.dead_letter(one) for one in found]

    async def purge_dead_letters(self) -> int:
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        try:
            return await _or_lost(link, link.purge_dead_letters())
        except LinkLost as error:
            raise BusAway("the connection was lost") from error


class _Consumer:
    """A queue of the broker that this process consumes: of one serving, or of all that it serves."""

    def __init__(self, queue: str, prefetch: int) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.served: dict[str, list[Served]] = {}
        self.end: Callable[[], Awaitable[None]] | None = None
        self.stuck = 0


class _Serving:
    """What `serve` returns."""

    def __init__(self, served: Served, end: Callable[[], Awaitable[None]]) -> None:
        self.queue = served.queue
        self._end = end

    async def cancel(self) -> None:
        await self._end()


async def _or_lost(link: Link, work: Awaitable[T]) -> T:
    """What asks the broker for an answer. Raises LinkLost for all that can happen to it."""
    try:
        return await work
    except TROUBLE as error:
        log.warning("bus.trouble", reason=type(error).__name__)
        link.lose()
        raise LinkLost from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        link.lose()
        raise LinkLost from None
