"""The bus contract for a process beside the one that owns the bus, over its Unix socket. Used by `instar agent`.

The owner may go and come back: then everything that is served and subscribed is so again, without a word from those who
asked for it. Meanwhile calls fail at once with NobodyListens and events are dropped, as with an owner whose process ends.
Commands that are being worked on go on to their end; nobody hears of it, and who sends them again finds it done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from instar.bus import frames as f
from instar.bus.contract import (
    BusAway,
    CommandHandler,
    ConsumerFailed,
    DeadLetter,
    EventHandler,
    Message,
    NobodyListens,
    Reply,
)
from instar.bus.subscriber import Subscriber

log = structlog.get_logger()

FIRST_CONNECT_MAX_S = 5.0
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 2.0
ANSWER_MARGIN_S = 2.0  # the owner watches the deadline; this is for an owner that hangs


class SocketBus:
    """A client of the `BusServer` at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids = itertools.count(1)
        self._channel: f.Channel | None = None
        self._pending: dict[int, asyncio.Future[Reply | None]] = {}
        self._served: dict[int, _Served] = {}
        self._subscribed: dict[int, _Subscribed] = {}
        self._work: set[asyncio.Task[None]] = set()
        self._tried = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect. When the owner is away this returns as well, after one try, and goes on trying."""
        self._keeper = asyncio.create_task(self._keep_connected(), name="bus connection")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_CONNECT_MAX_S):
                await self._tried.wait()

    async def close(self) -> None:
        """Ends subscribers, and the work at hand."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for one in list(self._subscribed.values()):
            await one.subscriber.cancel()
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    async def serve(self, queue: str, handler: CommandHandler, *, concurrency_max: int) -> _Served:
        """Returns when the owner sends commands here; while it is away at once, and it will when it is back."""
        served = _Served(next(self._ids), queue, handler, concurrency_max, self._end_serving)
        self._served[served.id] = served
        await self._ask_if_connected(served.frame())
        return served

    async def _end_serving(self, served: _Served) -> None:
        if self._served.pop(served.id, None) is not None:
            await self._ask_if_connected(f.Cancel(next(self._ids), served.id))

    async def subscribe(self, topic: str, handler: EventHandler) -> _Subscribed:
        id_ = next(self._ids)
        subscriber = Subscriber(topic, handler, lambda _: None)
        subscribed = self._subscribed[id_] = _Subscribed(id_, subscriber, self._end_subscription)
        await self._ask_if_connected(subscribed.frame())
        return subscribed

    async def _end_subscription(self, subscribed: _Subscribed) -> None:
        if self._subscribed.pop(subscribed.id, None) is not None:
            await self._ask_if_connected(f.Cancel(next(self._ids), subscribed.id))

    async def call(self, queue: str, message: Message) -> Reply:
        async with asyncio.timeout(message.deadline_s + ANSWER_MARGIN_S):
            return await self._ask(f.Call(next(self._ids), queue, message)) or Reply()

    async def send(self, queue: str, message: Message) -> None:
        async with asyncio.timeout(message.deadline_s + ANSWER_MARGIN_S):
            await self._ask(f.Call(next(self._ids), queue, message, answered=False))

    async def publish(self, topic: str, message: Message) -> None:
        if self._channel is None:
            log.debug("bus.event_dropped", topic=topic, why="the owner of the bus is away")
            return
        with contextlib.suppress(ConnectionError):
            await self._channel.send(f.Publish(topic, message))

    async def notify(self, topic: str, message: Message) -> None:
        if self._channel is None:
            raise BusAway("the owner of the bus is away")
        await self.publish(topic, message)

    def listening_s(self) -> float:
        """The process beside hears its owner, or knows at once that it is gone."""
        return time.monotonic()

    async def forget(self, queue: str) -> None:
        """A queue is no more than its consumers."""

    async def waiting(self, queue: str) -> int | None:
        return None  # the bus's owner knows

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        return []

    async def purge_dead_letters(self) -> int:
        return 0

    # --- questions --------------------------------------------------------------------------------------------------

    async def _ask(self, frame: f.Serve | f.Subscribe | f.Cancel | f.Call) -> Reply | None:
        """Raises NobodyListens when the owner is away or goes, else what it says."""
        channel = self._channel
        if channel is None:
            raise NobodyListens("the owner of the bus is away")
        answer: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        self._pending[frame.id] = answer
        try:
            await channel.send(frame)
            return await answer
        except ConnectionError as error:
            raise NobodyListens("the owner of the bus is gone") from error
        finally:
            del self._pending[frame.id]

    async def _ask_if_connected(self, frame: f.Serve | f.Subscribe | f.Cancel) -> None:
        with contextlib.suppress(NobodyListens):  # told when the owner is back
            await self._ask(frame)

    # --- the connection ---------------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            channel = await self._connect()
            if channel is not None:
                log.debug("bus.connected")
                await self._follow(channel)
                log.info("bus.owner_away")
                pause_s = RETRY_FIRST_S
            self._tried.set()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def _connect(self) -> f.Channel | None:
        connecting = f.unix_socket()
        try:
            with f.socket_address(self._path) as address:
                connecting.connect(address)
            channel = f.Channel(*await asyncio.open_unix_connection(sock=connecting))
        except OSError:
            connecting.close()
            return None
        return channel

    async def _follow(self, channel: f.Channel) -> None:
        """Tell who we are and what we serve, then take what comes, until the connection ends."""
        try:
            await channel.send(f.Hello(f.VERSION))
            # Before the list is told: what is served from here on is told by itself, and twice does no harm.
            self._channel = channel
            for served in list(self._served.values()):
                await channel.send(served.frame())
            for subscribed in list(self._subscribed.values()):
                await channel.send(subscribed.frame())
            self._tried.set()
            while (frame := await channel.receive()) is not None:
                self._take(channel, frame)
        except ConnectionError:
            return
        finally:
            self._channel = None
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(NobodyListens("the owner of the bus is gone"))
            await channel.close()

    def _take(self, channel: f.Channel, frame: f.Frame) -> None:
        match frame:
            case f.Command(serving=serving):
                task = asyncio.create_task(self._handle(channel, frame, self._served.get(serving)))
                self._work.add(task)
                task.add_done_callback(self._work.discard)
            case f.Event(subscription=id_, message=message):
                if (subscribed := self._subscribed.get(id_)) is not None:
                    subscribed.subscriber.put(message)
            case f.Answer(id=id_, reply=reply):
                if (answer := self._pending.get(id_)) is not None and not answer.done():
                    answer.set_result(reply)
            case f.Refusal(id=id_):
                if (answer := self._pending.get(id_)) is not None and not answer.done():
                    answer.set_exception(_made_again(frame))

    async def _handle(self, channel: f.Channel, command: f.Command, served: _Served | None) -> None:
        outcome: f.Answer | f.Refusal
        if served is None:  # cancelled while the command was on its way
            outcome = f.Refusal(command.id, "nobody")
        else:
            try:
                async with served.slots:
                    outcome = f.Answer(command.id, await served.handler(command.message))
            except Exception as error:
                log.exception("bus.command_failed", queue=served.queue)
                outcome = f.Refusal(command.id, "failed", type(error).__name__)
        try:
            await channel.send(outcome)
        except f.FrameTooLarge:
            await channel.send(f.Refusal(command.id, "failed", "the reply is too large"))
        except ConnectionError:
            log.info("bus.reply_dropped", kind=command.message.kind, why="the owner of the bus is gone")


class _Served:
    """A queue that this process serves."""

    def __init__(
        self,
        id_: int,
        queue: str,
        handler: CommandHandler,
        concurrency_max: int,
        end: Callable[[_Served], Awaitable[None]],
    ) -> None:
        self.id, self.queue, self.handler = id_, queue, handler
        self._concurrency_max = concurrency_max
        # Also here: work that an earlier owner gave may still be at hand when the next one gives more.
        self.slots = asyncio.Semaphore(concurrency_max)
        self._end = end

    def frame(self) -> f.Serve:
        return f.Serve(self.id, self.queue, self._concurrency_max)

    async def cancel(self) -> None:
        await self._end(self)


class _Subscribed:
    """A topic that this process hears."""

    def __init__(self, id_: int, subscriber: Subscriber, end: Callable[[_Subscribed], Awaitable[None]]) -> None:
        self.id, self.subscriber = id_, subscriber
        self._end = end

    def frame(self) -> f.Subscribe:
        return f.Subscribe(self.id, self.subscriber.topic)

    async def cancel(self) -> None:
        await self._end(self)
        await self.subscriber.cancel()


def _made_again(refusal: f.Refusal) -> Exception:
    match refusal.reason:
        case "nobody":
            return NobodyListens(refusal.text)
        case "late":
            return TimeoutError(refusal.text)
    return ConsumerFailed(refusal.text)
