"""Several conductors on one database and bus, and conductors that stop in the middle of their work."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from instar.config import QuotaSettings
from instar.engine.conductor import Conductor
from instar.engine.run import Run
from instar.lifecycle.operations import operations
from instar.model.states import VmState
from instar.store.conductors import conductor_remove, conductors_fetch
from instar.store.contract import Result, Statement, Store, WriteConflict
from instar.store.operations import operation_fetch
from tests.lifecycle.harness import SETTINGS, Plane, plane, prepared
from tests.lifecycle.watching import Held, check_no_trace, until

ROOMY = msgspec.structs.replace(SETTINGS, quota=QuotaSettings(instances=-1, cores=-1, ram=-1))


class Stoppable:
    """A conductor that SIGSTOP can be played on: no beat, no poll, no new operation, and its steps go no further."""

    def __init__(self, one: Plane, doing: Counter[str], overlaps: list[str]) -> None:
        self._doing = doing
        self._overlaps = overlaps
        self._going = asyncio.Event()
        self._going.set()
        self.begun = 0
        functions = {action: self._watched(function) for action, function in operations(one.control.cloud).items()}
        self.conductor = Conductor(
            one.control.store, one.control.bus, functions, ROOMY.engine, alone=False, monotonic=time.monotonic
        )

    def _watched(self, function: Callable[[Run], Awaitable[None]]) -> Callable[[Run], Awaitable[None]]:
        async def watched(run: Run) -> None:
            execute = run._execute

            async def slowly(name: str, call: Any, args: Any, limit_s: float, *, forward: bool) -> Any:
                async def around(*given: Any) -> Any:
                    await self._going.wait()
                    self.begun += 1
                    key = f"{run.operation.id} {name}"
                    self._doing[key] += 1
                    if self._doing[key] > 1:
                        self._overlaps.append(name)
                    try:
                        await asyncio.sleep(0.002)
                        result = await call(*given)
                    finally:
                        self._doing[key] -= 1
                    await self._going.wait()
                    return result

                return await execute(name, around, args, limit_s, forward=forward)

            run._execute = slowly  # type: ignore[method-assign]
            await function(run)

        return watched

    async def stop(self) -> None:
        self._going.clear()
        for loop in self.conductor._loops:
            loop.cancel()
        for subscription in self.conductor._subscriptions:
            await subscription.cancel()

    async def close(self) -> None:
        self._going.set()  # also where the test failed while it was stopped
        await self.conductor.close()

    async def go_on(self) -> None:
        self._going.set()
        conductor = self.conductor
        conductor._loops = [asyncio.create_task(conductor._beat()), asyncio.create_task(conductor._poll())]


async def test_operations_of_a_stopped_conductor_are_taken_over_and_it_does_no_harm_when_it_goes_on(
    tmp_path: Path, image_file: Path
) -> None:
    async with prepared(tmp_path, image_file, ROOMY) as one, contextlib.AsyncExitStack() as closing:
        await one.control.conductor.close()  # the two below do everything
        doing: Counter[str] = Counter()
        overlaps: list[str] = []
        two = [Stoppable(one, doing, overlaps) for _ in range(2)]
        for stoppable in two:
            await stoppable.conductor.open()
            closing.push_async_callback(stoppable.close)
        draft = await one.new()
        made = [(await one.control.lifecycle.create(one.context(), [draft]))[0] for _ in range(60)]
        stopped, other = two

        async def both_are_in_the_middle() -> bool:
            return min(stopped.begun, other.begun) > 20 and bool(stopped.conductor.in_flight)

        await until("both conductors work", both_are_in_the_middle)
        held = stopped.conductor.in_flight
        await stopped.stop()
        began = time.monotonic()
        assert held

        async def taken_over() -> bool:
            taken = [await operation_fetch(one.control.store, operation_id) for operation_id in held]
            return all(found and (found.finished_at or found.owner == other.conductor.id) for found in taken)

        await until("the other one takes over", taken_over)
        assert time.monotonic() - began < ROOMY.engine.lease_s * 20  # a machine that is busy otherwise needs more than 2
        await one.settled()
        await stopped.go_on()
        await asyncio.sleep(0.3)
        await one.settled()
        # A step that the stopped one was in the middle of is done again: it was never told that it ended. That it also
        # went on by itself, at the same time as the other, would be an overlap of the work itself.
        assert overlaps == []
        ended = [await one.fetch(instance.id) for instance in made]
        assert {(instance.vm_state, instance.facts.fault) for instance in ended} == {(VmState.ACTIVE, None)}
        assert await one.guests() == {instance.id: instance.host for instance in ended}
        addresses = [ip.ip_address for i in ended for port in i.facts.ports for ip in port.definition.fixed_ips]
        assert len(set(addresses)) == 60
        assert await one.findings() == []
        # It noticed that it had lost its lease, and works again.

        async def registered() -> bool:
            return stopped.conductor.id in await conductors_fetch(one.control.store)

        await until("the conductor is registered again", registered)


@pytest.mark.parametrize("step", ["claim", "allocate ports", "create root disk", "start guest"])
async def test_operation_in_flight_when_the_process_ends_goes_on_at_the_next_start(
    tmp_path: Path, image_file: Path, step: str
) -> None:
    async with prepared(tmp_path, image_file) as one:
        held = one.around_step = Held(step)
        instance = await one.create()
        await held.wait()
    async with plane(tmp_path) as one:
        await one.settled()
        ended = await one.fetch(instance.id)
        assert (ended.vm_state, ended.facts.fault) == (VmState.ACTIVE, None)
        assert (await one.last_operation(instance.id)).epoch == 2
        assert await one.findings() == []


async def test_delete_accepted_just_before_the_process_ends_is_done_at_the_next_start(
    tmp_path: Path, image_file: Path
) -> None:
    async with prepared(tmp_path, image_file) as one:
        held = one.around_step = Held("start guest")
        instance = await one.create()
        await held.wait()
        await one.control.lifecycle.delete(one.context(), await one.fetch(instance.id))
    async with plane(tmp_path) as one:
        await one.settled()
        assert (await one.fetch(instance.id)).vm_state is VmState.DELETED
        await check_no_trace(one)


async def test_operation_is_found_without_a_word_although_the_clock_was_set_back(
    tmp_path: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody owned was left alone while its start, by the clock, was less than a poll ago. After the clock had been
    set back a day, or on a conductor whose clock was behind the API's, that was true for a day."""
    async with prepared(tmp_path, image_file) as one:

        async def lose(_bus: object, _operation: object) -> None:
            return

        monkeypatch.setattr("instar.lifecycle.door.tell_accepted", lose)
        real = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: real() + 86_400 * 10**9)
        instance = await one.create()
        monkeypatch.setattr(time, "time_ns", real)
        operation = await one.last_operation(instance.id)
        assert operation.started_at > real() // 1000 + 3_600_000_000, "the clock was not turned"
        await one.settled()
        assert (await one.fetch(instance.id)).vm_state is VmState.ACTIVE


async def test_clock_that_jumps_ahead_does_not_make_a_conductor_lose_its_lease(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = one.around_step = Held("start guest")
    instance = await one.create()
    await held.wait()
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 86_400 * 10**9)
    await asyncio.sleep(0.5)
    held.go.set()
    await one.settled()
    operation = await one.last_operation(instance.id)
    assert (operation.result, operation.epoch) == ("Success", 1)
    assert (await one.fetch(instance.id)).host in one.hosts
    assert all(one.control.hosts.is_up(host) for host in one.hosts)


async def test_conductor_that_closes_starts_nothing_more(one: Plane) -> None:
    """An operation that ended while its conductor closed had it take the one that waited next: that one ran on beside the
    closing of the database."""
    instance = await one.created()
    held = one.around_step = Held("stop guest")
    await one.control.lifecycle.stop(one.context(), instance)
    await held.wait()
    conductor = one.control.conductor
    conductor._closing = True
    held.go.set()

    async def idle() -> bool:
        return not conductor.in_flight

    await until("the stop is done", idle)
    await one.control.lifecycle.start(one.context(), await one.fetch(instance.id))
    await asyncio.sleep(0.3)
    assert conductor.in_flight == []
    assert (await one.last_operation(instance.id)).owner is None
    conductor._closing = False
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is VmState.ACTIVE


async def test_an_operation_whose_turn_comes_while_it_is_being_refused_begins_at_once(
    tmp_path: Path, image_file: Path
) -> None:
    """The word that a request was accepted and the end of the operation before it come at the same time: the first try is
    refused, and the second came during it. Nobody else tells of it before the poll."""
    engine = msgspec.structs.replace(SETTINGS.engine, poll_s=600)
    async with prepared(tmp_path, image_file, msgspec.structs.replace(SETTINGS, engine=engine)) as one:
        instance = await one.created()
        conductor = one.control.conductor
        conductor._store = store = RefusingOnce(one.control.store, conductor)  # type: ignore[assignment]
        await one.control.lifecycle.stop(one.context(), instance)
        await one.settled()
        assert store.refused
        assert (await one.fetch(instance.id)).vm_state is VmState.STOPPED


class RefusingOnce:
    """A store that refuses the first who wants to own an operation, after another has asked for the same."""

    def __init__(self, store: Store, conductor: Conductor) -> None:
        self._store, self._conductor, self.refused = store, conductor, False
        self.read = store.read

    async def write(self, *statements: Statement) -> list[Result]:
        taking = [one for one in statements if one.sql.startswith("UPDATE operations SET owner")]
        if not taking or self.refused:
            return await self._store.write(*statements)
        self.refused = True
        await self._conductor._take(str(taking[0].params["id"]), None)
        raise WriteConflict


@pytest.mark.parametrize("step", ["claim", "allocate ports", "create root disk", "start guest"])
async def test_former_owner_in_the_middle_of_a_step_changes_nothing_any_more(
    tmp_path: Path, image_file: Path, step: str
) -> None:
    """It is held in front of the work of a step until another conductor has done everything, and then goes on with it."""
    async with plane(tmp_path, ROOMY) as one:
        await one.prepare(image_file)
        held = one.around_step = Held(step)
        instance = await one.create()
        await held.wait()
        former = one.control.conductor
        for loop in former._loops:
            loop.cancel()  # it does not even notice
        other = Conductor(one.control.store, one.control.bus, operations(one.control.cloud), ROOMY.engine, alone=False)
        await one.control.store.write(conductor_remove(former.id))  # as if it had been silent for its lease's time
        await other.open()
        await one.settled()
        built = await one.fetch(instance.id)
        assert (built.vm_state, built.facts.fault) == (VmState.ACTIVE, None)
        await one.control.lifecycle.delete(one.context(), built)
        await one.settled()
        held.go.set()

        async def idle() -> bool:
            return not former.in_flight

        await until("the former owner has let go", idle)
        await check_no_trace(one)
        await other.close()
