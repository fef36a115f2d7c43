"""One connection to a RabbitMQ broker, from its handshake to its first trouble. Used by `rabbitmq.py`, which makes others.

A channel that the broker closes ends the whole connection: what was on it is unknown then, as after a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aio_pika
import aiormq.exceptions
import structlog
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.commands import Basic
from yarl import URL

from instar.bus import rabbitmq_wire as wire
from instar.bus.contract import NobodyListens
from instar.config import RabbitMqSettings
from instar.errors import StartupError

log = structlog.get_logger()

CLOSE_MAX_S = 5.0
SERVE_MAX_S = 10.0
EVENT_MAX_S = 5.0  # a broker that takes nothing (its memory or disk is full) does not hold up who tells an event
TROUBLE = (aiormq.exceptions.AMQPError, ConnectionError, RuntimeError, OSError, EOFError)

OnDelivery = Callable[[Channel, DeliveredMessage], Awaitable[None]]


class LinkLost(Exception):
    """The connection ended; whether the broker has what was sent last is not known."""


class Unroutable(Exception):
    """No queue is bound for this key."""


class QueueStuck(Exception):
    """The broker does not let anybody consume this queue."""


class Overfull(Exception):
    """The broker did not take it: the queue has all that it may have."""


class Refused(NobodyListens):
    """Who is logged in may not do this."""


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


class Link:
    """Made by `Link.open`. `gone` ends with it."""

    def __init__(self, connection: aio_pika.Connection, user: str, settings: RabbitMqSettings) -> None:
        self.user = user
        self.since = self.heard_at = time.monotonic()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._settings = settings
        self._confirmed: Channel
        self._plain: Channel
        self._events = ""
        self._closing = False
        self._background: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, url: str, settings: RabbitMqSettings, *,
        name: str, replies_key: str, on_reply: OnDelivery, on_event: OnDelivery,
    ) -> Link:
        """Connected, with what is common to all made sure of. Raises one of TROUBLE, TimeoutError, StartupError."""
        full = await asyncio.to_thread(_url, url, settings)
        context = await asyncio.to_thread(_tls, url, settings)
        connection = aio_pika.Connection(full, ssl_context=context, client_properties={"connection_name": name})
        link = cls(connection, user_in(url), settings)
        connection.close_callbacks.add(lambda *_: link.lose())
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                await connection.connect()
            async with asyncio.timeout(settings.connect_timeout_s * 4):  # a broker that has just begun is slow
                await link._set_up(replies_key, on_reply, on_event)
        except BaseException:
            await link.close()
            raise
        return link

    async def _set_up(self, replies_key: str, on_reply: OnDelivery, on_event: OnDelivery) -> None:
        await self._ensure_exchanges()
        self._confirmed = await self._channel(confirms=True)
        self._plain = await self._channel()
        await self._consume_own(wire.REPLIES, replies_key, on_reply)
        self._on_event = on_event

    async def close(self) -> None:
        self._closing = True
        self.lose()
        with contextlib.suppress(TimeoutError, *TROUBLE):
            async with asyncio.timeout(CLOSE_MAX_S):
                await self._connection.close()

    def lose(self) -> None:
        """The end, whoever noticed it first."""
        if self.gone.done():
            return
        self.gone.set_result(None)
        if not self._closing:
            task = asyncio.ensure_future(self.close())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    # --- sending ----------------------------------------------------------------------------------------------------

    async def publish(self, exchange: str, key: str, body: bytes, properties: Basic.Properties, *, mandatory: bool) -> None:
        """The broker has it, on its disk where it is to be kept. Raises LinkLost, Overfull, Refused, and where it is
        `mandatory` Unroutable."""
        try:
            await self._confirmed.basic_publish(
                body, exchange=exchange, routing_key=key, properties=properties, mandatory=mandatory, wait=False
            )
        except aiormq.exceptions.PublishError:
            raise Unroutable(key) from None
        except aiormq.exceptions.DeliveryError:
            raise Overfull(key) from None
        except aiormq.exceptions.ChannelAccessRefused:
            self.lose()
            raise Refused(key) from None
        except TROUBLE as error:
            self.lose()
            raise LinkLost from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self.lose()  # not we were cancelled, but what the connection had in its hands
            raise LinkLost from None

    async def tell(self, exchange: str, key: str, body: bytes, properties: Basic.Properties) -> None:
        """Send what may be lost. Raises LinkLost."""
        try:
            async with asyncio.timeout(EVENT_MAX_S):
                await self._plain.basic_publish(body, exchange=exchange, routing_key=key, properties=properties, wait=False)
        except TimeoutError:
            log.warning("bus.event_dropped", key=key, why="the broker takes nothing")
        except TROUBLE as error:
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
        self, queue: str, keys: list[str], prefetch: int, on_delivery: OnDelivery
    ) -> Callable[[], Awaitable[None]]:
        """Commands of `queue` come to `on_delivery`, at most `prefetch` that are not acknowledged. Returns what ends it.
        Raises QueueStuck."""
        await self._ensure_queue(queue, wire.queue_arguments(queue, self._settings))
        channel = await self._channel()
        for key in keys:
            await channel.queue_bind(queue, wire.COMMANDS, key, nowait=True)
        await channel.basic_qos(prefetch_count=prefetch)
        try:
            async with asyncio.timeout(SERVE_MAX_S):
                tag = await self._consume(channel, queue, on_delivery, no_ack=False)
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
        async def deliver(delivered: DeliveredMessage) -> None:
            self.heard_at = time.monotonic()
            await on_delivery(channel, delivered)

        channel.on_consumer_cancel_callbacks.add(lambda _: self.lose())  # somebody deleted the queue: make it again
        consuming = await channel.basic_consume(queue, deliver, no_ack=no_ack)
        return consuming.consumer_tag or ""

    # --- queues and exchanges ---------------------------------------------------------------------------------------

    async def _channel(self, *, confirms: bool = False) -> Channel:
        channel = await self._scratch(confirms=confirms)
        channel.closing.add_done_callback(lambda _: self.lose())
        return channel

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
