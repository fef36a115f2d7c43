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
from collections.abc import Coroutine

import aiormq.exceptions
import msgspec
import structlog

from instar.bus import rabbitmq_wire as wire
from instar.bus.amqp_confirms import LinkLost, Overfull, Unroutable
from instar.bus.amqp_lane import Delivered
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
from instar.bus.rabbitmq_link import TROUBLE, Link, address, or_lost, user_in
from instar.bus.rabbitmq_serving import Consumers, Serving
from instar.bus.subscriber import Subscriber
from instar.config import RabbitMqSettings
from instar.errors import StartupError

log = structlog.get_logger()

FIRST_CONNECT_MAX_S = 10.0
SET_UP_MAX_S = 60.0  # of all that is served and heard, on a broker that has just begun
SEND_MAX_S = 5.0  # the broker may take so long to promise that it keeps a command
NOTIFY_MAX_S = 10.0
COME_BACK_S = 5.0  # after a connection was lost: others come back as well, and until then a queue may be missing
QUIET_MAX_S = 2.0  # without a word for so long, not even our own, nobody's silence means anything
SILENT_HEARTBEATS = 3
AGAIN_S = 0.25
LIVED_WELL_S = 5.0
DEAD_LETTERS_SHOWN_MAX = 500



class RabbitMqBus:
    """`url` as in the setting `bus`. `shared_queue`: all hosts that this process serves have this one queue in common, for
    agents of very many. `name` is what the broker shows for the connection."""

    def __init__(self, url: str, settings: RabbitMqSettings, *, shared_queue: str = "", name: str = "instar") -> None:
        self._url = url
        self._settings = settings
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
        self._consumers = Consumers(settings, shared_queue, lambda: self._link)
        self._subscribers: list[Subscriber] = []
        self._waiting: dict[str, asyncio.Future[Reply | Exception]] = {}
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
        await self._consumers.close()

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
                said = self._say_not_connected(str(error) if about_channel else type(error).__name__, said)
            except StartupError as error:
                # Who starts is to hear of it. Later it is a file that is just being replaced: it is read again.
                if not self._tried.is_set():
                    raise
                said = self._say_not_connected(error.message, said)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Not we were cancelled, but what a connection had in its hands that broke off while it was set up.
                said = self._say_not_connected("it broke off", said)
            self._unlink()
            self._tried.set()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 -- so that not all come at once
            pause_s = min(pause_s * 2, settings.reconnect_max_s)

    def _say_not_connected(self, reason: str, said: str) -> str:
        """Returns what was said: aloud where it is new."""
        tell = log.debug if reason == said else log.warning
        tell("bus.not_connected", broker=address(self._url), reason=reason)
        return reason

    async def _connect(self) -> Link:
        link = await Link.open(
            self._url, self._settings, name=self._name,
            replies_key=self._replies_key, on_reply=self._on_reply, on_event=self._on_event,
        )  # fmt: skip
        try:
            async with asyncio.timeout(SET_UP_MAX_S), self._consumers.changing:
                self._link = link
                if self._lost_before:
                    self._listens_from = time.monotonic() + COME_BACK_S
                for binding in {wire.event_binding(one.topic) for one in self._subscribers}:
                    await link.hear(binding)
                await self._consumers.connected(link)
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
        self._consumers.disconnected()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(LinkLost())

    # --- commands: who sends them -------------------------------------------------------------------------------------

    async def call(self, queue: str, message: Message) -> Reply:
        self._check_size(message)
        id_, ends = secrets.token_hex(16), time.monotonic() + message.deadline_s
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(message.deadline_s):
                while True:
                    await self._ready_to_send()
                    answer: asyncio.Future[Reply | Exception] = loop.create_future()
                    self._waiting[id_] = answer
                    link = self._ask(queue, message, id_, ends, answer)
                    outcome = await answer
                    if isinstance(outcome, Reply):
                        return outcome
                    if isinstance(outcome, Unroutable):
                        if link is None or not self._lost_before or time.monotonic() - link.since > COME_BACK_S:
                            raise NobodyListens(queue)
                        await asyncio.sleep(AGAIN_S)
                    elif isinstance(outcome, Overfull):
                        await asyncio.sleep(AGAIN_S)
                    elif isinstance(outcome, LinkLost):
                        await asyncio.sleep(0)
                    else:
                        raise outcome
        finally:
            self._waiting.pop(id_, None)

    async def _ready_to_send(self) -> None:
        """There is a connection, and it takes more."""
        if not self._linked.is_set():
            await self._linked.wait()
        while (link := self._link) is not None and link.is_full:
            with contextlib.suppress(LinkLost):
                await link.drained()
            await asyncio.sleep(0)

    def _ask(
        self, queue: str, message: Message, id_: str, ends: float, answer: asyncio.Future[Reply | Exception]
    ) -> Link | None:
        """The command is on its way; what keeps it from there is the answer, too."""

        def told(problem: Exception | None) -> None:
            if problem is not None and not answer.done():
                answer.set_result(problem)

        link = self._link
        if link is None:
            told(LinkLost())
            return None
        properties = wire.command_properties(message, id_, link.user, ends - time.monotonic(), self._replies_key)
        link.publish_soon(wire.COMMANDS, queue, message.body, properties, told, mandatory=True)
        return link

    async def send(self, queue: str, message: Message) -> None:
        self._check_size(message)
        link = self._link
        if link is None:
            raise NobodyListens("the broker is away")
        properties = wire.command_properties(message, secrets.token_hex(16), link.user, message.deadline_s, "")
        try:
            async with asyncio.timeout(SEND_MAX_S):
                if link.is_full:
                    await link.drained()
                await link.publish(wire.COMMANDS, queue, message.body, properties, mandatory=True)
        except (Unroutable, Overfull, LinkLost, TimeoutError) as error:
            raise NobodyListens(queue) from error

    def _on_reply(self, delivered: Delivered) -> None:
        self._heard()
        properties = delivered.properties
        if properties is None:
            return
        answer = self._waiting.get(properties.correlation_id or "")
        if answer is None or answer.done():
            return  # it was late, or asked for twice
        if properties.message_type == wire.REPLY:
            try:
                answer.set_result(wire.decode_reply(delivered.body))
            except msgspec.MsgspecError:
                answer.set_result(ConsumerFailed("the reply is not understood"))
        elif properties.message_type == wire.NOBODY:
            answer.set_result(NobodyListens(delivered.body.decode(errors="replace")))
        else:
            answer.set_result(ConsumerFailed(delivered.body.decode(errors="replace")))

    def _check_size(self, message: Message) -> None:
        if len(message.body) > self._settings.message_max_bytes:
            raise MessageTooLarge(f"{len(message.body)} bytes")

    # --- commands: who does them --------------------------------------------------------------------------------------

    async def serve(self, queue: str, handler: CommandHandler, *, concurrency_max: int) -> Serving:
        """Returns when the broker sends commands here; while it is away at once, and it will when it is back."""
        return await self._consumers.serve(queue, handler, concurrency_max)

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
                if link.is_full:
                    await link.drained()
                await link.publish(wire.NOTIFICATIONS, key, body, properties, mandatory=False)
        except (LinkLost, Overfull, NobodyListens, TimeoutError) as error:
            raise BusAway("the broker did not promise to keep it") from error

    async def subscribe(self, topic: str, handler: EventHandler) -> Subscriber:
        """Returns when events come here; while the broker is away at once, and they will when it is back."""
        subscriber = Subscriber(topic, handler, self._forget_subscriber)
        async with self._consumers.changing:
            self._subscribers.append(subscriber)
            link = self._link
            if link is not None:
                with contextlib.suppress(LinkLost):
                    await or_lost(link, link.hear(wire.event_binding(topic)))
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
        async with self._consumers.changing:
            if all(wire.event_binding(one.topic) != binding for one in self._subscribers):
                with contextlib.suppress(*TROUBLE):
                    await link.hear_no_more(binding)

    def _on_event(self, delivered: Delivered) -> None:
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
            await or_lost(link, link.delete_queue(queue))
        except LinkLost as error:
            raise BusAway("the connection was lost") from error

    async def waiting(self, queue: str) -> int | None:
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        try:
            return await or_lost(link, link.waiting(wire.DEAD_LETTERS if queue == DEAD else queue))
        except LinkLost as error:
            raise BusAway("the connection was lost") from error

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        try:
            found = await or_lost(link, link.dead_letters(min(limit, DEAD_LETTERS_SHOWN_MAX)))
        except LinkLost as error:
            raise BusAway("the connection was lost") from error
        return [wire.dead_letter(one) for one in found]

    async def purge_dead_letters(self) -> int:
        link = self._link
        if link is None:
            raise BusAway("the broker is away")
        try:
            return await or_lost(link, link.purge_dead_letters())
        except LinkLost as error:
            raise BusAway("the connection was lost") from error
