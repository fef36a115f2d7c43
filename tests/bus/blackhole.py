"""A TCP proxy that can stop passing anything on, without a word to either side: a network that is cut."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType


class Blackhole:
    """On a free port of loopback, before the port `to`. `swallow`: bytes go in and do not come out."""

    def __init__(self, to: int) -> None:
        self._to = to
        self.swallow = self.refuse = False
        self.port = 0
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Blackhole:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuse:
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        try:
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        finally:
            self._tasks.discard(task)
            back.close()
            writer.close()

    async def _pass(self, from_: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        swallowed = False
        while data := await from_.read(65_536):
            swallowed = swallowed or self.swallow  # what is lost on the way makes all that follows nonsense
            if not swallowed:
                to.write(data)
                await to.drain()
        to.close()
