"""A bounded pool of daemon threads for calls that may block for ever. Used by connection.py.

The standard library's pool is joined when the interpreter ends: one call that waits for a daemon that hangs would keep the
whole process from ending.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from instar.errors import HypervisorError

T = TypeVar("T")

_Work = tuple[Callable[[], Any], asyncio.Future[Any], asyncio.AbstractEventLoop]


class CallThreads:
    """`count` threads, begun when they are first needed."""

    def __init__(self, count: int, *, name: str) -> None:
        self._count, self._name = count, name
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._begun = 0
        self._idle = threading.Semaphore(0)

    async def run(self, call: Callable[[], T]) -> T:
        """The result of `call`. A caller that is cancelled leaves a call that has begun to its end, alone. Raises
        HypervisorError where there is no thread, and the machine has none left."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._idle.acquire(blocking=False) and self._begun < self._count:
            self._begin()
        self._work.put((call, future, loop))
        return await future

    def _begin(self) -> None:
        try:
            threading.Thread(target=self._serve, name=f"{self._name}-{self._begun + 1}", daemon=True).start()
        except RuntimeError as error:
            if not self._begun:
                raise HypervisorError(reason="the host has no thread left for a call") from error
            return  # those that there are get to it
        self._begun += 1

    def close(self) -> None:
        """Threads end after what they do now."""
        for _ in range(self._begun):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            call, future, loop = work
            result: Any = None
            failure: BaseException | None = None
            if not future.cancelled():
                try:
                    result = call()
                except Exception as error:  # it belongs to the caller, whatever it is
                    failure = error
            self._idle.release()
            try:
                loop.call_soon_threadsafe(_settle, future, result, failure)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return


def _settle(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)
