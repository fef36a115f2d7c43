"""The owner's side of the bus over a Unix socket: what clients serve, call and hear goes through the bus of this process.

Opened by the embedded cloud beside its memory bus. The socket is for its owner alone (mode 0600); a client that goes, in
whatever way, serves nothing from that moment, and commands that it had fail with NobodyListens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from instar.bus import frames as f
from instar.bus.contract import (
    Bus,
    CommandHandler,
    ConsumerFailed,
    EventHandler,
    Message,
    NobodyListens,
    Reply,
    Subscription,
)
from instar.errors import StartupError

log = structlog.get_logger()

CLIENTS_WAITING_MAX = 128  # connections that the kernel keeps for us while we are busy
CALLS_MAX = 1000  # of one client at once


class BusServer:
    """Clients of `bus` on a socket at `path`."""

    def __init__(self, bus: Bus, path: Path) -> None:
        self._bus = bus
        self._path = path
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """A socket that an earlier process left is replaced: who may use the directory is settled before. Raises
        StartupError."""
        listening = f.unix_socket()
        try:
            self._path.unlink(missing_ok=True)
            with f.socket_address(self._path) as address:
                listening.bind(address)
            self._server = await asyncio.start_unix_server(self._serve, sock=listening, backlog=CLIENTS_WAITING_MAX)
        except OSError as error:
            listening.close()
            raise StartupError(f"The socket {self._path} cannot be made: {error.strerror}.") from error

    async def close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._path.unlink(missing_ok=True)
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        channel = f.Channel(reader, writer)
        client = _Client(self._bus, channel)
        try:
            # Cancelled at the end of this process: else its streams log that as an error. The client's end may be seen
            # by a write.
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await client.run()
        except Exception:
            log.exception("bus.client_failed")
        finally:
            for end in (client.leave, channel.close):
                with contextlib.suppress(asyncio.CancelledError):  # the client may go in the moment in which we end
                    await end()
            self._clients.discard(task)


class _Client:
    """One connection: what it serves and hears stands in the bus under handlers that relay."""

    def __init__(self, bus: Bus, channel: f.Channel) -> None:
        self._bus = bus
        self._channel = channel
        self._registered: dict[int, Subscription] = {}
        self._commands: dict[int, asyncio.Future[Reply]] = {}
        self._ids = itertools.count(1)
        self._calls: set[asyncio.Task[None]] = set()
        self._gone = False

    async def run(self) -> None:
        """Until the client goes."""
        hello = await self._channel.receive()
        if not isinstance(hello, f.Hello) or hello.version != f.VERSION:
            log.warning("bus.client_refused", why="it speaks another version", wanted=f.VERSION)
            return
        while (frame := await self._channel.receive()) is not None:
            await self._take(frame)

    async def leave(self) -> None:
        """First nobody is sent here any more, then those who wait are told."""
        self._gone = True
        for subscription in list(self._registered.values()):
            await subscription.cancel()
        for command in list(self._commands.values()):
            if not command.done():
                command.set_exception(NobodyListens("the consumer is gone"))
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _take(self, frame: f.Frame) -> None:
        match frame:
            case f.Serve(id=id_, queue=queue, concurrency_max=most):
                if id_ not in self._registered:
                    serving = await self._bus.serve(queue, self._relay(id_), concurrency_max=most)
                    self._registered[id_] = serving
                await self._channel.send(f.Answer(id_))
            case f.Subscribe(id=id_, topic=topic):
                if id_ not in self._registered:
                    self._registered[id_] = await self._bus.subscribe(topic, self._teller(id_))
                await self._channel.send(f.Answer(id_))
            case f.Cancel(id=id_, ends=ended):
                if (subscription := self._registered.pop(ended, None)) is not None:
                    await subscription.cancel()
                await self._channel.send(f.Answer(id_))
            case f.Publish(topic=topic, message=message):
                await self._bus.publish(topic, message)
            case f.Call():
                await self._begin_call(frame)
            case f.Answer(id=id_, reply=reply):
                if (command := self._commands.get(id_)) is not None and not command.done():
                    command.set_result(reply or Reply())
            case f.Refusal(id=id_, reason=reason, text=text):
                if (command := self._commands.get(id_)) is not None and not command.done():
                    command.set_exception(NobodyListens() if reason == "nobody" else ConsumerFailed(text))

    def _relay(self, serving: int) -> CommandHandler:
        async def relay(message: Message) -> Reply:
            if self._gone:
                raise NobodyListens("the consumer is gone")
            id_ = next(self._ids)
            answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            self._commands[id_] = answer
            try:
                await self._channel.send(f.Command(id_, serving, message))
                return await answer
            except ConnectionError as error:
                raise NobodyListens("the consumer is gone") from error
            finally:
                del self._commands[id_]

        return relay

    def _teller(self, subscription: int) -> EventHandler:
        async def tell(message: Message) -> None:
            try:
                await self._channel.send(f.Event(subscription, message))
            except ConnectionError:
                return  # it is about to leave

        return tell

    async def _begin_call(self, call: f.Call) -> None:
        if len(self._calls) >= CALLS_MAX:
            await self._channel.send(f.Refusal(call.id, "failed", f"more than {CALLS_MAX} calls at once"))
            return
        self._start(self._call(call))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, call: f.Call) -> None:
        outcome: f.Answer | f.Refusal
        try:
            if call.answered:
                outcome = f.Answer(call.id, await self._bus.call(call.queue, call.message))
            else:
                await self._bus.send(call.queue, call.message)
                outcome = f.Answer(call.id)
        except NobodyListens:
            outcome = f.Refusal(call.id, "nobody")
        except TimeoutError:
            outcome = f.Refusal(call.id, "late")
        except Exception as error:
            log.exception("bus.command_failed", queue=call.queue)
            outcome = f.Refusal(call.id, "failed", type(error).__name__)
        try:
            await self._channel.send(outcome)
        except f.FrameTooLarge:
            await self._channel.send(f.Refusal(call.id, "failed", "the reply is too large"))
        except ConnectionError:
            return
