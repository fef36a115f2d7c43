"""The streams that run now, each in a thread of its own: at most so many, and all can be ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import structlog

from instar.streams.cut import Cut, StreamCut
from instar.streams.grants import is_under

log = structlog.get_logger()

END_MAX_S = 5.0


class Running:
    """`limit` streams at once. Any thread may call any method."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._threads: dict[Cut, threading.Thread] = {}
        self._names: dict[Cut, str] = {}
        self._closed = False

    def start(self, work: Callable[[Cut], None], thread_name: str) -> bool:
        """`work` runs with a cut of its own, which it must watch. False: there are too many already, the machine has no
        thread left for it, or it is closed."""
        cut = Cut()

        def run() -> None:
            try:
                work(cut)
            except StreamCut:
                pass
            finally:
                with self._lock:
                    self._threads.pop(cut, None)
                    self._names.pop(cut, None)

        with self._lock:
            if self._closed or len(self._threads) >= self._limit:
                return False
            thread = self._threads[cut] = threading.Thread(target=run, name=thread_name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # whoever accepts connections must outlive that
                del self._threads[cut]
                log.warning("stream.no_thread", reason=str(error))
                return False
        return True

    def name(self, cut: Cut, name: str) -> None:
        """From now on `cut_under` finds it."""
        with self._lock:
            self._names[cut] = name

    def unnamed_count(self) -> int:
        with self._lock:
            return len(self._threads) - len(self._names)

    def cut_under(self, prefix: str) -> None:
        with self._lock:
            found = [cut for cut, name in self._names.items() if is_under(name, prefix)]
        for cut in found:
            cut.now()

    async def close(self) -> None:
        """All are ended, and no new one starts. Returns when their threads are gone, or after 5 s."""
        with self._lock:
            self._closed = True
            threads = dict(self._threads)
        for cut in threads:
            cut.now()
        await asyncio.to_thread(_join, list(threads.values()))


def _join(threads: list[threading.Thread]) -> None:
    ends_at = time.monotonic() + END_MAX_S
    for thread in threads:
        thread.join(max(0.0, ends_at - time.monotonic()))
