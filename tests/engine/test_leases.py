"""Leases, the keeper and guards on both databases: who may act, who may not any more, and that what a former owner is in
the middle of writes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from instar.bus.memory import MemoryBus
from instar.config import EngineSettings
from instar.engine.conductor import Conductor
from instar.engine.keeper import Keeper
from instar.engine.lease import Lease, act_under, ensure_lease
from instar.errors import LeaseLost
from instar.store.conductors import (
    KeeperLost,
    conductor_beat,
    conductor_evict,
    conductor_register,
    conductor_remove,
    conductors_fetch,
    keeper_fetch,
    keeper_guard,
    keeper_leave,
    keeper_take,
)
from instar.store.contract import Statement, Store
from instar.store.guard import guard_task, guarding
from instar.store.postgresql import PostgresqlStore
from tests.patience import PATIENCE_S
from tests.postgresql_server import PATIENT

LEASE_S = 6.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def fact(name: str) -> Statement:
    return Statement("INSERT INTO cloud_facts (name, value) VALUES (:name, 'x')", {"name": name}, rows=1)


async def facts(store: Store) -> set[str]:
    return {row["name"] for row in await store.read("SELECT name FROM cloud_facts WHERE value = 'x'")}


async def takes(store: Store, conductor_id: str) -> bool:
    (result,) = await store.write(keeper_take(conductor_id))
    return result.rowcount == 1


async def test_one_conductor_keeps_until_it_is_gone_or_leaves(store: Store) -> None:
    await store.write(conductor_register("a"), conductor_register("b"))
    assert await takes(store, "a")
    assert await takes(store, "a"), "it is the keeper already"
    assert not await takes(store, "b")
    assert not await takes(store, "nobody"), "only who is registered"
    await store.write(keeper_guard("a"), fact("by a"))
    with pytest.raises(KeeperLost):
        await store.write(keeper_guard("b"), fact("by b"))
    (result,) = await store.write(conductor_evict("a", 7))
    assert result.rowcount == 0, "it has another beat than was seen"
    await store.write(conductor_beat("a"))
    (result,) = await store.write(conductor_evict("a", 1))
    assert (result.rowcount, await conductors_fetch(store)) == (1, {"b": 0})
    assert await takes(store, "b")
    with pytest.raises(KeeperLost):
        await store.write(keeper_guard("a"), fact("late"))
    await store.write(keeper_leave("b"), conductor_remove("b"))
    assert (await keeper_fetch(store), await facts(store)) == (None, {"by a"})


async def test_of_many_that_want_to_keep_one_does(store: Store) -> None:
    names = [f"c{number}" for number in range(12)]
    for name in names:
        await store.write(conductor_register(name))
    for _ in range(4):
        won = await asyncio.gather(*(takes(store, name) for name in names))
        assert sum(won) == 1
        await store.write(conductor_remove(names[won.index(True)]))
        del names[won.index(True)]


async def test_lease_is_trusted_for_less_than_others_wait_and_then_asked_for(store: Store) -> None:
    clock = Clock()
    lease = Lease(store, LEASE_S, clock=clock)
    await lease.acquire(alone=False)
    clock.now += LEASE_S * 0.8
    assert lease.held
    clock.now += LEASE_S * 0.1
    assert not lease.held, "others may take it away after the whole of its time"
    await lease.ensure()
    assert (lease.held, await conductors_fetch(store)) == (True, {lease.id: 1})
    clock.now += 60
    await store.write(conductor_remove(lease.id))
    with pytest.raises(LeaseLost):
        await lease.ensure()
    assert not lease.held
    await store.write(conductor_register(lease.id))
    with pytest.raises(LeaseLost):
        await lease.ensure()  # once lost it is lost for good


async def test_tasks_act_by_the_lease_of_who_began_them_until_that_is_over(store: Store) -> None:
    clock = Clock()
    lease = Lease(store, LEASE_S, clock=clock)
    await lease.acquire(alone=False)
    await store.write(conductor_remove(lease.id))
    clock.now += 60

    async def work(over: bool) -> None:
        mandate = act_under(lease)
        mandate.over = over
        await asyncio.create_task(ensure_lease())

    with pytest.raises(LeaseLost):
        await asyncio.create_task(work(over=False))
    await asyncio.create_task(work(over=True))
    await ensure_lease()  # this task acts by none


async def test_who_has_joined_shows_life_though_what_opens_before_it_takes_long(store: Store) -> None:
    bus = MemoryBus()
    await bus.open()
    conductor = Conductor(store, bus, {}, EngineSettings(lease_s=0.6), alone=True)
    try:
        await conductor.join()
        first = (await conductors_fetch(store))[conductor.id]
        async with asyncio.timeout(PATIENCE_S):
            while (await conductors_fetch(store))[conductor.id] == first:
                await asyncio.sleep(0.05)
    finally:
        await conductor.close()
        await conductor.close()
        await bus.close()
    assert await conductors_fetch(store) == {}


async def test_what_is_written_under_a_guard_is_written_only_while_it_holds(store: Store) -> None:
    await store.write(conductor_register("a"))
    await takes(store, "a")
    middle, goes_on = asyncio.Event(), asyncio.Event()

    async def service() -> list[int]:
        first = await store.write(fact("before"), fact("before too"))
        middle.set()
        await goes_on.wait()
        await store.write(fact("after"))
        return [result.rowcount for result in first]

    async def step() -> list[int]:
        with guarding(keeper_guard("a")):
            return await asyncio.create_task(service())

    running = asyncio.create_task(step())
    await middle.wait()
    await store.write(keeper_leave("a"))
    goes_on.set()
    with pytest.raises(KeeperLost):
        await running
    assert await facts(store) == {"before", "before too"}
    await takes(store, "a")
    middle.clear()
    with pytest.raises(Exception):  # noqa: B017 - the same rows again: refused by their own rule, guard or not
        await asyncio.create_task(step())


async def test_the_guard_of_a_step_ends_with_it_and_that_of_a_task_does_not(store: Store) -> None:
    begun: list[asyncio.Task[None]] = []
    after = asyncio.Event()

    async def later(name: str) -> None:
        await after.wait()
        await store.write(fact(name))

    async def step() -> None:
        with guarding(keeper_guard("nobody")):
            begun.append(asyncio.create_task(later("of a step")))

    async def kept() -> None:
        guard_task(keeper_guard("nobody"))
        begun.append(asyncio.create_task(later("of the keeper")))

    await asyncio.create_task(step())
    await asyncio.create_task(kept())
    after.set()
    of_step, of_keeper = await asyncio.gather(*begun, return_exceptions=True)
    assert of_step is None
    assert isinstance(of_keeper, KeeperLost)
    assert await facts(store) == {"of a step"}


async def test_rows_of_a_process_that_says_nothing_more_are_freed(postgresql_url: str) -> None:
    """It was stopped in the middle of its transaction: kept open, what a conductor had could not be taken over."""
    store = PostgresqlStore(postgresql_url, PATIENT)
    await store.open()
    await store.write(conductor_register("a"))
    stopped = await asyncpg.connect(postgresql_url)
    try:
        transaction = stopped.transaction()
        await transaction.start()
        said_at = time.monotonic()
        await stopped.execute("UPDATE conductors SET beat = beat + 1 WHERE id = 'a'")
        await store.end_silent()
        silent_s = time.monotonic() - said_at
        assert silent_s > 1 or not stopped.is_closed(), "it has said something a moment ago"
        await asyncio.sleep(1.5)
        waiting = asyncio.create_task(store.write(conductor_beat("a")))
        await asyncio.sleep(1.0)
        await store.end_silent()
        async with asyncio.timeout(PATIENCE_S):
            await waiting
        assert await conductors_fetch(store) == {"a": 1}
    finally:
        stopped.terminate()
        await store.close()


class HeldLease:
    """A lease that is held until the test says otherwise."""

    id, held = "a", True


class Registered:
    """Of a conductor what a keeper needs."""

    def __init__(self) -> None:
        self.lease = HeldLease()

    async def join(self) -> None:
        return

    def before_leaving(self, call: Callable[[], Awaitable[None]]) -> None:
        return


class SlowToClose:
    """What is kept: closing it takes until the test says so."""

    def __init__(self) -> None:
        self.closing, self.may_close = asyncio.Event(), asyncio.Event()
        self.closed = 0

    async def open(self) -> None:
        return

    async def close(self) -> None:
        self.closing.set()
        await self.may_close.wait()
        self.closed += 1


async def test_keeper_that_ends_while_it_stops_for_a_lost_lease_closes_what_it_kept_once(store: Store) -> None:
    await store.write(conductor_register("a"))
    conductor, kept = Registered(), SlowToClose()
    keeper = Keeper(store, conductor, kept, lease_s=0.1)  # type: ignore[arg-type]
    await keeper.open()
    assert keeper.keeps
    conductor.lease.held = False
    async with asyncio.timeout(PATIENCE_S):
        await kept.closing.wait()
        ending = asyncio.create_task(keeper.close())
        await asyncio.sleep(0.05)
        assert not ending.done(), "another may not begin before this one has ended"
        kept.may_close.set()
        await ending
    assert (kept.closed, keeper.keeps) == (1, False)
