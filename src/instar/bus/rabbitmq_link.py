"""One connection to a RabbitMQ broker, from its handshake to its first trouble. Used by `rabbitmq.py`, which makes others.

A channel that the broker closes ends the whole connection: what was on it is unknown then, as after a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aio_pika
import aiormq.exceptions
import structlog
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp import frame
from pamqp.commands import Basic
from yarl import URL

from instar.bus import amqp_frames as frames
from instar.bus import rabbitmq_wire as wire
from instar.bus.amqp_confirms import Confirms, LinkLost, Refused, Told
from instar.bus.amqp_lane import Delivered, Lane, LaneChannel, LaneFactory, OnDelivery
from instar.config import RabbitMqSettings
from instar.errors import StartupError

log = structlog.get_logger()

CLOSE_MAX_S = 5.0
SERVE_MAX_S = 10.0
FEW = 4  # commands at once: who takes no more waits for each acknowledgement
EVENT_MAX_S = 5.0  # a broker that takes nothing (its memory or disk is full) does not hold up who tells an event
T = TypeVar("T")
TROUBLE = (aiormq.exceptions.AMQPError, ConnectionError, RuntimeError, OSError, EOFError)



class QueueStuck(Exception):
    """The broker does not let anybody consume this queue."""


def user_in(url: str) -> str:
    return URL(url).user or "guest"


def address(url: str) -> str:
    """Of a URL, what may be written into a log."""
    parsed = URL(url)
    return f"{parsed.scheme}://{parsed.user or 'guest'}@{parsed.host}:{parsed.port or 5672}{parsed.path}"


def _url(url: str, settings: RabbitMqSettings) -> URL:
    """With password and heartbeat. Reads a file. Raises StartupError."""
    parsed = URL(url).update_query(heartbeat=str(settings.heartbeat_s))
    if settings.password_file:
        try:
            password = Path(settings.password_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"The file {settings.password_file} with the bus's password cannot be read.") from error
        parsed = parsed.with_password(password)
    return parsed


def _tls(url: str, settings: RabbitMqSettings) -> ssl.SSLContext | None:
    """Reads files. Raises StartupError."""
    if not url.startswith("amqps:"):
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
        if settings.certificate_file:
            context.load_cert_chain(settings.certificate_file, settings.key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise StartupError(f"The bus's certificates cannot be used: {error.strerror}.") from error
    return context


class Taken:
    """Where commands of a queue come from, and what is said of each by its tag. Nothing is said once the connection ended:
    then they come again."""

    def __init__(self, lane: Lane, channel: int, prefetch: int) -> None:
        self._lane, self._channel = lane, channel
        self._write_ack = lane.write if prefetch < FEW else lane.write_with_the_next

    def ack(self, tag: int) -> None:
        with contextlib.suppress(ConnectionError):
            self._write_ack(frame.marshal(Basic.Ack(tag), self._channel))

    def reject(self, tag: int) -> None:
        """It becomes a dead letter."""
        with contextlib.suppress(ConnectionError):
            self._lane.write(frame.marshal(Basic.Reject(tag, requeue=False), self._channel))

    def requeue(self, tag: int) -> None:
        """It goes back into its queue, where it is counted how often that happened."""
        with contextlib.suppress(ConnectionError):
            self._lane.write(frame.marshal(Basic.Nack(tag, requeue=True), self._channel))


OnCommand = Callable[[Taken, Delivered], None]


class Link:
    """Made by `Link.open`. `gone` ends with it."""

    def __init__(self, user: str, settings: RabbitMqSettings) -> None:
        self.user = user
        self.since = time.monotonic()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._connection: aio_pika.Connection
        self._lane: Lane
        self._confirms: Confirms | None = None
        self._plain: Channel
        self._frame_max = 0
        self._events = ""
        self._closing = False
        self._background: set[asyncio.Task[None]] = set()
        self._end: type[Exception] = LinkLost

    @classmethod
    async def open(
        cls, url: str, settings: RabbitMqSettings, *,
        name: str, replies_key: str, on_reply: OnDelivery, on_event: OnDelivery,
    ) -> Link:
        """Connected, with what is common to all made sure of. Raises one of TROUBLE, TimeoutError, StartupError."""
        full = await asyncio.to_thread(_url, url, settings)
        context = await asyncio.to_thread(_tls, url, settings)
        link = cls(user_in(url), settings)
        connection = aio_pika.Connection(full, ssl_context=context, client_properties={"connection_name": name})
        factory = LaneFactory(link.lose)
        connection.kwargs["transport_factory"] = factory
        link._connection = connection
        connection.close_callbacks.add(lambda *_: link.lose())
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                await connection.connect()
            async with asyncio.timeout(settings.connect_timeout_s * 4):  # a broker that has just begun is slow
                await link._set_up(factory, replies_key, on_reply, on_event)
        except BaseException:
            await link.close()
            raise
        return link

    async def _set_up(self, factory: LaneFactory, replies_key: str, on_reply: OnDelivery, on_event: OnDelivery) -> None:
        assert self._connection.transport is not None
        assert factory.lane is not None
        self._lane = factory.lane
        self._frame_max = self._connection.transport.connection.connection_tune.frame_max
        await self._ensure_exchanges()
        self._confirms = Confirms(self._lane, (await self._channel(confirms=True)).number, self._frame_max)
        self._plain = await self._channel()
        await self._consume_own(wire.REPLIES, replies_key, on_reply)
        self._on_event = on_event

    @property
    def heard_at(self) -> float:
        """When a message came, in seconds of the monotonic clock."""
        return self._lane.heard_at

    async def close(self) -> None:
        self._closing = True
        self.lose()
        with contextlib.suppress(TimeoutError, *TROUBLE):
            async with asyncio.timeout(CLOSE_MAX_S):
                await self._connection.close()

    def lose(self, refused: bool = False) -> None:
        """The end, whoever noticed it first. `refused`: what was sent may not be."""
        if self.gone.done():
            return
        self.gone.set_result(None)
        self._end = Refused if refused else LinkLost
        if self._confirms is not None:
            self._confirms.end(self._end)
        if not self._closing:
            task = asyncio.ensure_future(self.close())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    # --- sending ----------------------------------------------------------------------------------------------------

    def publish_soon(
        self, exchange: str, key: str, body: bytes, properties: Basic.Properties, told: Told, *, mandatory: bool = False
    ) -> None:
        """`told` is called once: with None when the broker has it, on its disk where it is to be kept; with LinkLost,
        Overfull or Refused, and where it is `mandatory` with Unroutable, when not."""
        if self.gone.done() or self._confirms is None:
            told(self._end())
            return
        try:
            self._confirms.send(exchange, key, body, properties, told, mandatory=mandatory)
        except ConnectionError:
            self.lose()
            told(self._end())

    async def publish(
        self, exchange: str, key: str, body: bytes, properties: Basic.Properties, *, mandatory: bool
    ) -> None:
        """The same; returns when the broker has it, raises what is told else."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.publish_soon(exchange, key, body, properties, partial(_tell, answer), mandatory=mandatory)
        await answer

    @property
    def is_full(self) -> bool:
        """The broker takes nothing more now. `drained` tells when it does; what is sent before is kept in memory."""
        return self._lane.is_full

    async def drained(self) -> None:
        """Raises LinkLost."""
        try:
            await self._lane.drained()
        except OSError as error:  # not each is a ConnectionError: the network may have no way to the broker any more
            self.lose()
            raise LinkLost from error

    async def tell(self, exchange: str, key: str, body: bytes, properties: Basic.Properties) -> None:
        """Send what may be lost. Raises LinkLost."""
        if self.gone.done():
            raise LinkLost
        try:
            if self._lane.is_full:
                async with asyncio.timeout(EVENT_MAX_S):
                    await self.drained()
            self._lane.write(
                frames.publish(
                    self._plain.number, exchange, key, properties, body, mandatory=False, frame_max=self._frame_max
                )
            )
        except TimeoutError:
            log.warning("bus.event_dropped", key=key, why="the broker takes nothing")
        except ConnectionError as error:
            self.lose()
            raise LinkLost from error

    # --- hearing ----------------------------------------------------------------------------------------------------

    async def hear(self, binding: str) -> None:
        """Events of this binding come to `on_event` from now on."""
        if not self._events:
            arguments = {"x-max-length": wire.EVENTS_WAITING_MAX, "x-overflow": "drop-head"}
            self._events = await self._consume_own(wire.EVENTS, binding, self._on_event, arguments)
            return
        await self._plain.queue_bind(self._events, wire.EVENTS, binding)

    async def hear_no_more(self, binding: str) -> None:
        if self._events:
            async with asyncio.timeout(CLOSE_MAX_S):  # who ends is not kept by a broker that is busy
                await self._plain.queue_unbind(self._events, wire.EVENTS, binding)

    async def serve(
        self, queue: str, keys: list[str], prefetch: int, on_command: OnCommand
    ) -> Callable[[], Awaitable[None]]:
        """Commands of `queue` come to `on_command`, at most `prefetch` that are not acknowledged. Returns what ends it.
        Raises QueueStuck."""
        await self._ensure_queue(queue, wire.queue_arguments(queue, self._settings))
        channel = await self._channel()
        for key in keys:
            await channel.queue_bind(queue, wire.COMMANDS, key, nowait=True)
        await channel.basic_qos(prefetch_count=prefetch)
        try:
            async with asyncio.timeout(SERVE_MAX_S):
                taken = Taken(self._lane, channel.number, prefetch)
                tag = await self._consume(channel, queue, partial(on_command, taken), no_ack=False)
        except TimeoutError:
            raise QueueStuck(queue) from None

        async def end() -> None:
            with contextlib.suppress(*TROUBLE):
                async with asyncio.timeout(CLOSE_MAX_S):
                    await channel.basic_cancel(tag)

        return end

    async def bind(self, queue: str, key: str) -> None:
        await self._plain.queue_bind(queue, wire.COMMANDS, key)

    async def _consume_own(
        self, exchange: str, key: str, on_delivery: OnDelivery, arguments: Mapping[str, Any] | None = None
    ) -> str:
        """A queue of this connection alone, which ends with it. Its messages need no acknowledgement."""
        channel = await self._channel()
        made = await channel.queue_declare("", exclusive=True, auto_delete=True, arguments=dict(arguments or {}))
        queue = made.queue or ""
        await channel.queue_bind(queue, exchange, key)
        await self._consume(channel, queue, on_delivery, no_ack=True)
        return queue

    async def _consume(self, channel: Channel, queue: str, on_delivery: OnDelivery, *, no_ack: bool) -> str:
        def deliver(delivered: Delivered) -> None:
            try:
                on_delivery(delivered)
            except Exception:
                log.exception("bus.delivery_failed", queue=queue)

        channel.on_consumer_cancel_callbacks.add(lambda _: self.lose())  # somebody deleted the queue: make it again
        self._lane.watch(LaneChannel(channel.number, on_delivery=deliver))
        consuming = await channel.basic_consume(queue, _by_the_lane, no_ack=no_ack)
        return consuming.consumer_tag or ""

    # --- queues and exchanges ---------------------------------------------------------------------------------------

    async def _channel(self, *, confirms: bool = False) -> Channel:
        channel = await self._scratch(confirms=confirms)
        channel.closing.add_done_callback(self._on_channel_closed)
        return channel

    def _on_channel_closed(self, closing: asyncio.Future[Any]) -> None:
        reason = None if closing.cancelled() else closing.exception()
        self.lose(refused=isinstance(reason, aiormq.exceptions.ChannelAccessRefused))

    async def _scratch(self, *, confirms: bool = False) -> Channel:
        """A channel whose end is not ours."""
        assert self._connection.transport is not None
        made = await self._connection.transport.connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        assert isinstance(made, Channel)
        return made

    async def _ensure_exchanges(self) -> None:
        """Who may not make them (agents) finds them made, or comes again. The queue of dead letters likewise."""
        try:
            channel = await self._scratch()
            for name in wire.EXCHANGES:
                await channel.exchange_declare(name, exchange_type="topic", durable=True)
        except aiormq.exceptions.ChannelAccessRefused:
            channel = await self._scratch()
            await channel.exchange_declare(wire.COMMANDS, passive=True)
            await channel.close()
            return
        try:
            await channel.exchange_declare(wire.NOTIFICATIONS, exchange_type="topic", durable=True)
            await channel.close()
        except aiormq.exceptions.ChannelPreconditionFailed:  # it is the consumers', too, and they were first
            log.warning("bus.exchange_differs", exchange=wire.NOTIFICATIONS)
        await self._ensure_queue(wire.DEAD_LETTERS, wire.dead_letters_arguments(self._settings))
        await self._bind_scratch(wire.DEAD_LETTERS, wire.DEAD, "#")
        if kept := self._settings.notifications_kept:
            for priority in ("info", "error"):
                queue = f"versioned_notifications.{priority}"
                await self._ensure_queue(queue, {"x-max-length": kept, "x-overflow": "drop-head"})
                await self._bind_scratch(queue, wire.NOTIFICATIONS, queue)

    async def _bind_scratch(self, queue: str, exchange: str, key: str) -> None:
        channel = await self._scratch()
        await channel.queue_bind(queue, exchange, key)
        await channel.close()

    async def _ensure_queue(self, queue: str, arguments: dict[str, Any]) -> None:
        """One that was made with other arguments (by another version, or before a setting changed) is taken as it is."""
        try:
            channel = await self._scratch()
            await channel.queue_declare(queue, durable=True, arguments=arguments)
        except aiormq.exceptions.ChannelPreconditionFailed:
            log.warning("bus.queue_differs", queue=queue, why="made with other settings; it changes when it is made anew")
            channel = await self._scratch()
            await channel.queue_declare(queue, passive=True)
        await channel.close()

    async def delete_queue(self, queue: str) -> None:
        """Raises one of TROUBLE."""
        channel = await self._scratch()
        await channel.queue_delete(queue)
        await channel.close()

    async def waiting(self, queue: str) -> int | None:
        """None: there is no such queue, or it is not ours to ask for. Raises one of TROUBLE."""
        channel = await self._scratch()
        try:
            declared = await channel.queue_declare(queue, passive=True)
        except (aiormq.exceptions.ChannelNotFoundEntity, aiormq.exceptions.ChannelAccessRefused):
            return None
        await channel.close()
        return declared.message_count

    async def dead_letters(self, limit: int) -> list[DeliveredMessage]:
        """The oldest; they stay where they are. Raises one of TROUBLE."""
        channel = await self._scratch()
        found: list[DeliveredMessage] = []
        try:
            while len(found) < limit:
                got = await channel.basic_get(wire.DEAD_LETTERS)
                if not isinstance(got.delivery, Basic.GetOk):
                    break
                found.append(got)
            if found:
                await channel.basic_nack(found[-1].delivery_tag or 0, multiple=True, requeue=True)
        finally:
            await channel.close()
        return found

    async def purge_dead_letters(self) -> int:
        """Raises one of TROUBLE."""
        channel = await self._scratch()
        purged = await channel.queue_purge(wire.DEAD_LETTERS)
        await channel.close()
        return purged.message_count or 0


def _tell(answer: asyncio.Future[None], problem: Exception | None) -> None:
    if not answer.done():
        if problem is None:
            answer.set_result(None)
        else:
            answer.set_exception(problem)


async def _by_the_lane(_: DeliveredMessage) -> None:
    """What the library calls for messages, of which none reaches it."""


async def or_lost(link: Link, work: Awaitable[T]) -> T:
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
        link.lose()  # not we were cancelled, but what the connection had in its hands
        raise LinkLost from None
