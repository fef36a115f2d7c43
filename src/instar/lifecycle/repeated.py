"""What looks at the record again and again, so that nothing is lost with a process. Used by the timers and the drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()


class Repeated:
    """Calls `look` from `open` until `close`, `every_s` seconds apart. A look that fails is logged, as `<name>.failed`."""

    def __init__(self, name: str, look: Callable[[], Awaitable[None]], *, every_s: float) -> None:
        self._name, self._look, self._every_s = name, look, every_s
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:
                log.exception(f"{self._name}.failed")
            await asyncio.sleep(self._every_s)
