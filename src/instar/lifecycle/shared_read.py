"""One read for many that want the same thing at about the same time: for the reconciler of thousands of hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedRead(Generic[T]):
    """Whoever asks gets what a read has found that began after the question: who asks while one runs shares the next."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._running: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    async def fresh(self) -> T:
        if self._next is None:
            self._next = asyncio.create_task(self._read_next(self._running), name="shared read")
        return await asyncio.shield(self._next)

    async def _read_next(self, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait((before,))
        self._running, self._next = self._next, None
        return await self._read()
