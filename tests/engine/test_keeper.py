"""Who does what is done once for all: that it ends as a whole, also where the process ends at that moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

from instar.bus.memory import MemoryBus
from instar.config import EngineSettings
from instar.engine.conductor import Conductor
from instar.engine.keeper import Keeper
from instar.store.sqlite import SqliteStore
from tests.patience import PATIENCE_S

LEASE_S = 0.6


class Work:
    """Takes its time to close."""

    def __init__(self) -> None:
        self.closing, self.go_on = asyncio.Event(), asyncio.Event()
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closing.set()
        await self.go_on.wait()
        self.closed += 1


async def test_a_keeper_that_is_closed_while_it_stops_ends_and_leaves_nothing_half_closed(tmp_path: Path) -> None:
    store, bus, work = SqliteStore(tmp_path / "instar.db", durable=False), MemoryBus(), Work()
    await store.open()
    await bus.open()
    conductor = Conductor(store, bus, {}, EngineSettings(lease_s=LEASE_S), alone=True)
    keeper = Keeper(store, conductor, work, lease_s=LEASE_S)
    try:
        await keeper.open()
        assert keeper.keeps and work.opened == 1
        conductor.lease.lost.set()
        async with asyncio.timeout(PATIENCE_S):
            await work.closing.wait()
            ending = asyncio.create_task(keeper.close())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not ending.done()
            work.go_on.set()
            await ending
        assert not keeper.keeps and work.closed == work.opened
    finally:
        work.go_on.set()
        await conductor.close()
        await bus.close()
        await store.close()
