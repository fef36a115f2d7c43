"""On PostgreSQL whoever takes over from an operation, or takes it, waits for a step's transaction, and never in a circle.

A step's transaction holds its operation first (the guard) and writes the instance later. What held the instance and then
wanted the operation would wait for it while it waits for the instance: PostgreSQL ends one of them after a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import msgspec
import pytest

from instar.errors import InstarError
from instar.lifecycle.new_records import new_operation
from instar.model.instance import Instance
from instar.model.states import Action, VmState
from instar.store.operations import operation_fetch, operation_insert, operations_unfinished
from tests.lifecycle.harness import SETTINGS, Plane, prepared
from tests.lifecycle.watching import Held, check_no_trace, until
from tests.postgresql_server import SERVER, TestServer

# Nobody looks for work by itself: the test says who takes it.
QUIET = msgspec.structs.replace(SETTINGS, engine=msgspec.structs.replace(SETTINGS.engine, poll_s=3600, lease_s=600))


@pytest.fixture
def on_postgresql(postgresql_server: TestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER, postgresql_server.server.url.rpartition("/")[0])


@asynccontextmanager
async def guarded(one: Plane, operation_id: str) -> AsyncIterator[asyncpg.Connection]:
    """A step's transaction, which has come as far as its guard."""
    connection = await asyncpg.connect(one.control.settings.database)
    try:
        async with connection.transaction():
            await connection.execute("UPDATE operations SET updated_at = updated_at WHERE id = $1", operation_id)
            yield connection
    finally:
        await connection.close()


async def goes_on(one: Plane, guard: asyncpg.Connection, instance_id: str) -> None:
    """Somebody waits for the guard's transaction; that one writes the instance all the same."""
    watcher = await asyncpg.connect(one.control.settings.database)

    async def waits() -> bool:
        mine = guard.get_server_pid()
        return any(
            mine in row["by"] for row in await watcher.fetch("SELECT pg_blocking_pids(pid) AS by FROM pg_stat_activity")
        )

    try:
        await until("somebody waits for the step", waits)
        await guard.execute("SET LOCAL lock_timeout = '500ms'")  # less than it takes to find a deadlock
        await guard.execute("UPDATE instances SET updated_at = updated_at WHERE id = $1", instance_id)
    finally:
        await watcher.close()


async def deletes(one: Plane, instance: Instance) -> None:
    await one.control.lifecycle.delete(one.context(), instance)


async def reboots_hard(one: Plane, instance: Instance) -> None:
    await one.control.lifecycle.reboot(one.context(), instance, hard=True)


async def resets(one: Plane, instance: Instance) -> None:
    await one.control.lifecycle.reset_state(one.context(roles=("admin",)), instance, VmState.ACTIVE)


@pytest.mark.usefixtures("on_postgresql")
@pytest.mark.parametrize("takes_over", [deletes, reboots_hard, resets])
async def test_who_takes_over_from_an_operation_waits_for_its_step(
    tmp_path: Path, image_file: Path, takes_over: Callable[[Plane, Instance], Awaitable[None]]
) -> None:
    async with prepared(tmp_path, image_file, QUIET) as one:
        instance = await one.created()
        held = one.around_step = Held("shut down guest")
        await one.control.lifecycle.reboot(one.context(), instance, hard=False)
        await held.wait()
        (operation,) = await operations_unfinished(one.control.store)
        async with guarded(one, operation.id) as guard:
            asked = asyncio.create_task(takes_over(one, await one.fetch(instance.id)))  # type: ignore[arg-type]
            await goes_on(one, guard, instance.id)
            assert not asked.done()
        await asked
        held.go.set()
        await one.settled()
        ended = await one.fetch(instance.id)
        assert ended.vm_state is (VmState.DELETED if takes_over is deletes else VmState.ACTIVE)
        first = await operation_fetch(one.control.store, operation.id)
        assert first is not None
        assert first.result == "Error"


@pytest.mark.usefixtures("on_postgresql")
async def test_who_takes_an_operation_waits_for_the_step_of_who_had_it(tmp_path: Path, image_file: Path) -> None:
    async with prepared(tmp_path, image_file, QUIET) as one:
        instance = await one.created()
        operation = new_operation(one.context(), instance, Action.STOP, Action.STOP)
        await one.control.store.write(operation_insert(operation))
        async with guarded(one, operation.id) as guard:
            taking = asyncio.create_task(one.control.conductor._take(operation.id, None))
            await goes_on(one, guard, instance.id)
            assert not taking.done()
        await taking
        taken = await operation_fetch(one.control.store, operation.id)
        assert taken is not None
        assert (taken.owner, taken.epoch) == (one.control.conductor.id, instance.epoch + 1)
        assert (await one.fetch(instance.id)).epoch == taken.epoch
        await one.settled()


@pytest.mark.usefixtures("on_postgresql")
async def test_of_many_who_take_over_at_the_same_moment_nobody_is_ended_by_the_database(
    tmp_path: Path, image_file: Path
) -> None:
    """Reboots, of both kinds, and deletes come while the steps of others are written."""
    async with prepared(tmp_path, image_file) as one:
        made = [await one.create(f"g{number}") for number in range(8)]
        await one.settled()
        lifecycle, context = one.control.lifecycle, one.context()

        async def ask(instance: Instance, turn: int) -> None:
            now = await one.fetch(instance.id)
            try:
                await lifecycle.reboot(context, now, hard=turn % 3 != 0)
            except InstarError:
                await asyncio.sleep(0)  # another was quicker

        for turn in range(12):
            await asyncio.gather(*(ask(instance, turn + number) for number, instance in enumerate(made * 2)))
        await asyncio.gather(*(lifecycle.delete(context, instance) for instance in made * 2))
        await one.settled()
        await check_no_trace(one)
        database = one.control.settings.database
    watcher = await asyncpg.connect(f"{database.rpartition('/')[0]}/postgres")
    name = database.rpartition("/")[2]
    try:

        async def all_left() -> bool:  # what a session has counted is told when it ends, at the latest
            return not await watcher.fetch("SELECT 1 FROM pg_stat_activity WHERE datname = $1", name)

        await until("all sessions have ended", all_left)
        assert await watcher.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = $1", name) == 0
    finally:
        await watcher.close()
