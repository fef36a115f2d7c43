"""How far operations are that move data: hosts tell, the record shows it (`progress`, and the numbers of a migration).

Runs beside a conductor. What is told late, or of an operation that has ended, changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from instar.bus.contract import Bus, Message, Subscription
from instar.model.commands import WORK_PROGRESS, HostProgress
from instar.store.contract import Statement, Store
from instar.store.moves import migration_progress, work_progress

log = structlog.get_logger()

WRITE_EVERY_S = 0.5


class ProgressKeeper:
    """Writes what hosts told, the newest of each instance, in one transaction at a time."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self._store, self._bus = store, bus
        self._told: dict[str, HostProgress] = {}  # one of each instance: bounded by the commands that hosts work on
        self._wake = asyncio.Event()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._subscription = await self._bus.subscribe(WORK_PROGRESS, self._on_progress)
        self._task = asyncio.create_task(self._write_for_ever(), name="progress")

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _on_progress(self, message: Message) -> None:
        told = msgspec.msgpack.decode(message.body, type=HostProgress)
        self._told[told.progress.instance_id] = told
        self._wake.set()

    async def _write_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            told, self._told = self._told, {}
            try:
                await self._store.write(*_statements(list(told.values())))
            except Exception:
                log.exception("progress.not_written")
            await asyncio.sleep(WRITE_EVERY_S)


def _statements(told: Sequence[HostProgress]) -> list[Statement]:
    """Moves before instances: in the order of operations.py."""
    moves = [
        migration_progress(one.progress.instance_id, one.progress.migration)
        for one in told
        if one.progress.migration is not None
    ]
    instances = [
        work_progress(one.progress.instance_id, one.epoch, min(max(one.progress.percent, 0), 100)) for one in told
    ]
    return [*moves, *instances]
