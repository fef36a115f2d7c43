"""How a stream's thread is ended from outside, and how a coroutine waits for one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class StreamCut(Exception):
    """Raised in a stream's thread when somebody ended it."""


class Cut:
    """One stream's end. Its sockets are shut down, so that whatever its thread waits for comes back at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    @property
    def done(self) -> bool:
        return self._event.is_set()

    def own(self, owned: socket.socket) -> None:
        """The socket is shut with the stream. Raises StreamCut when that was before."""
        with self._lock:
            self._sockets.append(owned)
        self.check()

    def now(self) -> None:
        """End the stream. Any thread may call this, any number of times."""
        self._event.set()
        with self._lock:
            for owned in self._sockets:
                with contextlib.suppress(OSError):
                    # Not SSLSocket.shutdown: that takes the encryption away under a thread that is reading.
                    socket.socket.shutdown(owned, socket.SHUT_RDWR)

    def check(self) -> None:
        if self._event.is_set():
            raise StreamCut

    def sleep(self, wait_s: float) -> None:
        """Wait, but not longer than the stream lives. Raises StreamCut."""
        if self._event.wait(wait_s):
            raise StreamCut


async def in_thread(work: Callable[[], T], cut: Cut, name: str) -> T:
    """What `work` returns, done in a thread of its own: a stream lasts too long for the loop's few shared threads. When
    the caller is cancelled the stream is cut, and this returns only when its thread has let go of everything."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # T may be None itself
        else:
            future.set_exception(error)

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cut.now()
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # looked at: nobody else will
        raise
