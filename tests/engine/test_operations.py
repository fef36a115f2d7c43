"""How an operation runs: journal, replay, undo, take-over. On the real store and bus, with small operations."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from instar.bus.contract import Bus, Message
from instar.bus.opening import bus_of as opened_bus
from instar.clock import now_us
from instar.config import EngineSettings, Settings
from instar.engine.conductor import Conductor, tell_accepted
from instar.engine.run import Run
from instar.errors import Conflict, HypervisorError, Unavailable
from instar.model.instance import Flavor, Instance, InstanceFacts, InstanceSpec
from instar.model.operation import Notification, Operation, Step
from instar.model.states import Action, PowerState, TaskState, VmState
from instar.store.conductors import conductor_remove
from instar.store.contract import Result, Statement
from instar.store.instances import instance_fetch, instance_insert, instance_mark_deleting, instance_set_states
from instar.store.operations import operation_fetch, operation_insert, operations_cancel, steps_fetch
from instar.store.sqlite import SqliteStore
from tests.patience import PATIENCE_S
from tests.rabbitmq_server import bus_of, ensure_bus, hear_notifications

SETTINGS = EngineSettings(poll_s=0.05, lease_s=0.3, step_deadline_s=90)


class Bench:
    """A store, a bus, and conductors that run the test's own operations."""

    def __init__(self, store: SqliteStore, bus: Bus) -> None:
        self.store = store
        self.bus = bus
        self.told: list[Notification] = []
        self._conductors: list[Conductor] = []

    async def conductor(
        self, functions: dict[str, Callable[[Run], Awaitable[None]]], *, alone: bool = True
    ) -> Conductor:
        conductor = Conductor(self.store, self.bus, functions, SETTINGS, alone=alone)
        await conductor.open()
        self._conductors.append(conductor)
        return conductor

    async def kill(self, conductor: Conductor) -> None:
        """As kill -9 would: nothing is written any more, nothing is unregistered."""
        tasks = [*conductor._loops, *(task for _, task in conductor._running.values())]
        for subscription in conductor._subscriptions:
            await subscription.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._conductors.remove(conductor)

    async def instance(self) -> Instance:
        return Instance(
            id=str(uuid.uuid4()), project_id="p", user_id="u", name="n", hostname="n", vm_state=VmState.BUILDING,
            task_state=TaskState.SCHEDULING, power_state=PowerState.NOSTATE, host=None, availability_zone=None,
            created_at=now_us(), updated_at=now_us(), launched_at=None, terminated_at=None, locked_by=None,
            reservation_id="r", turn=1, epoch=0, revision=0, facts=InstanceFacts(),
            spec=InstanceSpec(flavor=Flavor("1", "nano", 1, 128, 1)),
        )  # fmt: skip

    async def accept_build(self) -> Operation:
        instance = await self.instance()
        operation = operation_of(instance, Action.CREATE)
        await self.store.write(instance_insert(instance), operation_insert(operation))
        await tell_accepted(self.bus, operation)
        return operation

    async def accept_delete(self, instance_id: str) -> Operation:
        operation = operation_of(await instance_fetch(self.store, instance_id), Action.DELETE)
        await self.store.write(
            operations_cancel(instance_id, operation), instance_mark_deleting(instance_id, TaskState.DELETING),
            operation_insert(operation, takes_over=True),
        )
        await tell_accepted(self.bus, operation)
        return operation

    async def finished(self, operation: Operation) -> Operation:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                now = await operation_fetch(self.store, operation.id)
                assert now is not None
                if now.finished_at is not None:
                    return now
                await asyncio.sleep(0.005)

    async def journal(self, operation: Operation) -> list[Step]:
        return await steps_fetch(self.store, operation.id)

    async def close(self) -> None:
        for conductor in self._conductors:
            await conductor.close()


def operation_of(instance: Instance, action: Action) -> Operation:
    now = now_us()
    return Operation(
        id=str(uuid.uuid4()), instance_id=instance.id, action=action.value, rule=action.value, request_id="req-1",
        user_id="u", project_id="p", turn=0, vm_state_before=instance.vm_state, arguments=b"\xc0", owner=None, epoch=0,
        cancelled_by=None, started_at=now, updated_at=now, finished_at=None, result=None, message=None,
    )  # fmt: skip


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    await asyncio.to_thread(ensure_bus, tmp_path)
    store, bus = SqliteStore(tmp_path / "instar.db", durable=False), opened_bus(Settings(bus=bus_of(tmp_path)))
    await store.open()
    await bus.open()
    bench = Bench(store, bus)

    async def remember(message: Message) -> None:
        bench.told.append(msgspec.msgpack.decode(message.body, type=Notification))

    await hear_notifications(bus, remember)
    yield bench
    await bench.close()
    await bus.close()
    await store.close()


class Calls:
    """What the test's steps did, in order; `fail` names the step that fails, `hold` the one that waits for `go`."""

    def __init__(self, *, fail: str = "", hold: str = "") -> None:
        self.done: list[str] = []
        self.fail = fail
        self.hold = hold
        self.held = asyncio.Event()
        self.go = asyncio.Event()

    async def do(self, name: str) -> str:
        self.done.append(name)
        if name == self.hold:
            self.held.set()
            await self.go.wait()
        if name == self.fail:
            raise HypervisorError(reason="as the test wants")
        return name.upper()

    async def undo(self, name: str) -> None:
        self.done.append(f"-{name}")

    async def build(self, run: Run) -> None:
        assert await run.step("a", self.do, "a", undo=self.undo) == "A"
        assert await run.step("b", self.do, "b", undo=self.undo, task=TaskState.NETWORKING) == "B"
        run.note(host="h1")
        assert await run.step("c", self.do, "c", undo=self.undo, task=TaskState.SPAWNING) == "C"
        await run.settle(VmState.ACTIVE, power_state=PowerState.RUNNING)

    async def delete(self, run: Run) -> None:
        await run.step("remove", self.do, "remove")
        run.note(deleted=1, terminated_at=now_us())
        await run.settle(VmState.DELETED)

    def functions(self) -> dict[str, Callable[[Run], Awaitable[None]]]:
        return {Action.CREATE: self.build, Action.DELETE: self.delete}


async def test_steps_run_once_each_and_settle_in_the_stable_state(bench: Bench) -> None:
    calls = Calls()
    await bench.conductor(calls.functions())
    operation = await bench.accept_build()
    assert (await bench.finished(operation)).result == "Success"
    assert calls.done == ["a", "b", "c"]
    instance = await instance_fetch(bench.store, operation.instance_id)
    assert (instance.vm_state, instance.task_state, instance.host) == (VmState.ACTIVE, None, "h1")
    journal = await bench.journal(operation)
    assert [(s.name, s.result, s.task_state) for s in journal] == [
        ("a", "Success", "scheduling"), ("b", "Success", "networking"), ("c", "Success", "spawning"),
    ]  # fmt: skip
    assert all(s.finished_at is not None and s.finished_at >= s.started_at for s in journal)


async def test_a_failure_is_undone_in_reverse_and_leaves_a_fault(bench: Bench) -> None:
    calls = Calls(fail="c")
    await bench.conductor(calls.functions())
    operation = await bench.accept_build()
    ended = await bench.finished(operation)
    assert (ended.result, ended.message) == ("Error", "The hypervisor failed: as the test wants")
    assert calls.done == ["a", "b", "c", "-c", "-b", "-a"]
    instance = await instance_fetch(bench.store, operation.instance_id)
    assert (instance.vm_state, instance.task_state) == (VmState.ERROR, None)
    assert instance.facts.fault is not None
    assert "as the test wants" in instance.facts.fault.message
    names = [step.name for step in await bench.journal(operation)]
    assert names == ["a", "b", "c", "undo c", "undo b", "undo a"]


@pytest.mark.parametrize("held", ["a", "b", "c"])
async def test_a_conductor_killed_in_a_step_is_followed_by_one_that_goes_on(bench: Bench, held: str) -> None:
    first = Calls(hold=held)
    dying = await bench.conductor(first.functions())
    operation = await bench.accept_build()
    await first.held.wait()
    await bench.kill(dying)
    second = Calls()
    await bench.conductor(second.functions())
    assert (await bench.finished(operation)).result == "Success"
    # What was recorded is not done again; the step at hand is, and so is the one before, whose end was not yet written.
    order = ["a", "b", "c"]
    assert second.done == order[order.index(held) :]


@pytest.mark.parametrize("held", ["-c", "-b", "-a"])
async def test_a_conductor_killed_while_undoing_is_followed_by_one_that_undoes_the_rest(bench: Bench, held: str) -> None:
    class Slow(Calls):
        async def undo(self, name: str) -> None:
            await super().undo(name)
            if f"-{name}" == held:
                self.held.set()
                await asyncio.Event().wait()

    first = Slow(fail="c")
    dying = await bench.conductor(first.functions())
    operation = await bench.accept_build()
    await first.held.wait()
    await bench.kill(dying)
    second = Calls(fail="c")
    await bench.conductor(second.functions())
    assert (await bench.finished(operation)).result == "Error"
    undos = ["-c", "-b", "-a"]
    assert second.done == undos[undos.index(held) :]


async def test_a_lease_that_ran_out_is_taken_over_and_the_slow_owner_can_do_nothing(bench: Bench) -> None:
    first = Calls(hold="b")
    slow = await bench.conductor(first.functions(), alone=False)
    operation = await bench.accept_build()
    await first.held.wait()
    slow._loops[0].cancel()  # it shows no sign of life any more, but it still runs
    for subscription in slow._subscriptions:
        await subscription.cancel()
    second = Calls()
    await bench.conductor(second.functions(), alone=False)
    ended = await bench.finished(operation)
    assert ended.result == "Success"
    assert ended.epoch == 2
    first.go.set()
    await asyncio.sleep(0.1)
    assert first.done == ["a", "b"], "the slow conductor went on although the operation was no longer its own"


async def test_a_lease_that_is_lost_between_two_undos_leaves_the_rest_to_whoever_takes_over(bench: Bench) -> None:
    """Each undo that was left failed with LeaseLost and was given up, and then the end was recorded: nobody else had taken
    the operation yet, so its guard held."""

    class Losing(Calls):
        async def undo(self, name: str) -> None:
            await super().undo(name)
            if name == "c" and self.done.count("-c") == 1:
                await bench.store.write(conductor_remove(losing.lease.id))
                losing.lease._shown_at = float("-inf")

    calls = Losing(fail="c")
    losing = await bench.conductor(calls.functions(), alone=False)
    ended = await bench.finished(await bench.accept_build())
    assert ended.result == "Error"
    assert calls.done[:4] == ["a", "b", "c", "-c"]
    assert calls.done[-2:] == ["-b", "-a"]


async def test_an_operation_whose_run_had_not_begun_when_the_lease_was_lost_is_taken_again(bench: Bench) -> None:
    """Its task was cancelled before its first line: it stood among those that run for ever, and nobody here took it."""
    calls = Calls()
    conductor = await bench.conductor(calls.functions(), alone=False)
    taken = conductor._take_and_start

    async def take_and_lose(operation_id: str, from_owner: str | None) -> None:
        await taken(operation_id, from_owner)
        if operation_id in conductor._running and conductor.lease is first:
            first.lost.set()
            losing.append(asyncio.create_task(conductor._register_anew()))
            conductor._running[operation_id][1].cancel()  # in the same turn of the loop

    first, losing = conductor.lease, list[asyncio.Task[None]]()
    conductor._take_and_start = take_and_lose  # type: ignore[method-assign]
    operation = await bench.accept_build()
    assert (await bench.finished(operation)).result == "Success"
    assert calls.done == ["a", "b", "c"]
    await asyncio.gather(*losing)


@pytest.mark.parametrize("held", ["a", "b", "c"])
async def test_a_delete_takes_over_a_build_which_is_unwound_first(bench: Bench, held: str) -> None:
    calls = Calls(hold=held)
    await bench.conductor(calls.functions())
    build = await bench.accept_build()
    await calls.held.wait()
    delete = await bench.accept_delete(build.instance_id)
    assert (await bench.finished(delete)).result == "Success"
    ended = await bench.finished(build)
    assert (ended.result, ended.message) == ("Error", "The operation was taken over by delete.")
    done = ["a", "b", "c"][: ["a", "b", "c"].index(held) + 1]
    assert calls.done == [*done, *(f"-{name}" for name in reversed(done)), "remove"]
    instance = await instance_fetch(bench.store, build.instance_id)
    assert instance.vm_state is VmState.DELETED


async def test_a_delete_accepted_while_no_conductor_runs_is_done_after_unwinding(bench: Bench) -> None:
    first = Calls(hold="b")
    dying = await bench.conductor(first.functions())
    build = await bench.accept_build()
    await first.held.wait()
    await bench.kill(dying)
    delete = await bench.accept_delete(build.instance_id)
    second = Calls()
    await bench.conductor(second.functions())
    assert (await bench.finished(delete)).result == "Success"
    assert second.done[-1] == "remove"
    assert "-a" in second.done


async def test_a_reset_of_the_state_ends_what_is_in_flight_without_touching_the_state(bench: Bench) -> None:
    calls = Calls(hold="b")
    await bench.conductor(calls.functions())
    build = await bench.accept_build()
    await calls.held.wait()
    reset = operation_of(await instance_fetch(bench.store, build.instance_id), Action.RESET_STATE)
    reset = msgspec.structs.replace(reset, finished_at=now_us(), result="Success")
    await bench.store.write(
        operations_cancel(build.instance_id, reset),
        instance_set_states(build.instance_id, VmState.ACTIVE),
        operation_insert(reset),
    )
    calls.go.set()
    ended = await bench.finished(build)
    assert ended.message == "The operation was taken over by resetState."
    instance = await instance_fetch(bench.store, build.instance_id)
    assert (instance.vm_state, instance.task_state) == (VmState.ACTIVE, None)
    assert "c" not in calls.done


async def test_a_step_that_takes_too_long_names_what_was_waited_for(bench: Bench) -> None:
    calls = Calls(hold="b")

    async def build(run: Run) -> None:
        await run.step("a", calls.do, "a", undo=calls.undo)
        await run.step("b", calls.do, "b", deadline_s=0.05)

    await bench.conductor({Action.CREATE: build})
    ended = await bench.finished(await bench.accept_build())
    assert ended.message == "Waited 0.05 seconds for step 'b'."
    assert calls.done == ["a", "b", "-a"]


async def test_a_defect_in_a_step_is_a_clear_fault_without_a_traceback_and_the_journal_has_it(bench: Bench) -> None:
    async def defect() -> None:
        raise ZeroDivisionError("secret detail")

    async def build(run: Run) -> None:
        await run.step("a", defect)

    await bench.conductor({Action.CREATE: build})
    operation = await bench.accept_build()
    ended = await bench.finished(operation)
    assert ended.message == "Step 'a' failed."
    (step,) = await bench.journal(operation)
    assert "ZeroDivisionError" in (step.traceback or "")


async def test_a_failed_scope_is_undone_and_the_next_attempt_has_names_of_its_own(bench: Bench) -> None:
    calls = Calls()

    async def build(run: Run) -> None:
        for host in ("h1", "h2"):
            try:
                async with run.scope():
                    await run.step("claim", calls.do, f"claim {host}", undo=calls.undo)
                    calls.fail = "spawn h1"
                    await run.step("spawn", calls.do, f"spawn {host}", undo=calls.undo)
                    await run.settle(VmState.ACTIVE)
                    return
            except HypervisorError:
                pass

    await bench.conductor({Action.CREATE: build})
    operation = await bench.accept_build()
    assert (await bench.finished(operation)).result == "Success"
    assert calls.done == ["claim h1", "spawn h1", "-spawn h1", "-claim h1", "claim h2", "spawn h2"]
    names = [step.name for step in await bench.journal(operation)]
    assert names == ["claim", "spawn", "undo spawn", "undo claim", "claim (2)", "spawn (2)"]


async def test_an_undo_that_fails_is_recorded_and_the_others_are_still_done(bench: Bench) -> None:
    """Whatever it raises: one that raised a Conflict was once tried again at every poll, without end."""

    class Stubborn(Calls):
        async def undo(self, name: str) -> None:
            await super().undo(name)
            if name == "b":
                raise Conflict("no")

    calls = Stubborn(fail="c")
    await bench.conductor(calls.functions())
    operation = await bench.accept_build()
    await bench.finished(operation)
    assert calls.done == ["a", "b", "c", "-c", "-b", "-a"]
    results = {step.name: step.result for step in await bench.journal(operation)}
    assert results["undo b"] == "Error"
    assert results["undo a"] == "Success"


async def test_notifications_tell_start_and_end_and_error(bench: Bench) -> None:
    calls = Calls()
    await bench.conductor(calls.functions())
    await bench.finished(await bench.accept_build())
    calls.fail = "a"
    await bench.finished(await bench.accept_build())
    async with asyncio.timeout(PATIENCE_S):
        while len(bench.told) < 4:
            await asyncio.sleep(0.01)
    assert [told.event_type for told in bench.told] == [
        "instance.create.start", "instance.create.end", "instance.create.start", "instance.create.error",
    ]  # fmt: skip
    assert bench.told[-1].payload["fault"]["exception"] == "HypervisorError"


@pytest.mark.parametrize("failing", range(1, 5))
async def test_a_database_that_is_away_for_a_moment_undoes_nothing(bench: Bench, failing: int) -> None:
    """A commit that failed was once taken for the failure of its step: the build was unwound for nothing."""
    calls = Calls()
    conductor = await bench.conductor(calls.functions())
    write, seen = bench.store.write, 0

    async def sometimes(*statements: Statement) -> list[Result]:
        nonlocal seen
        if any("UPDATE operations" in one.sql and "epoch = :epoch" in one.sql for one in statements[:1]):
            seen += 1
            if seen == failing:
                raise Unavailable(retry_after_s=1)
        return await write(*statements)

    bench.store.write = sometimes  # type: ignore[method-assign]
    operation = await bench.accept_build()
    assert (await bench.finished(operation)).result == "Success"
    assert seen > failing, "the write that should fail was never made"
    assert not [done for done in calls.done if done.startswith("-")]
    assert conductor.in_flight == []


async def test_an_operation_that_is_being_taken_is_not_taken_again_by_the_poll(bench: Bench) -> None:
    """The poll once saw, in the database, an operation that was ours but that we had not heard to be ours yet: it took it
    again under a newer epoch, and two runs of one operation chased each other."""
    calls = Calls()
    conductor = await bench.conductor(calls.functions())
    write = bench.store.write

    async def late(*statements: Statement) -> list[Result]:
        results = await write(*statements)
        if len(statements) == 2 and "SET owner" in statements[1].sql:
            await conductor._look_for_work(first=False)
        return results

    bench.store.write = late  # type: ignore[method-assign]
    operation = await bench.accept_build()
    assert (await bench.finished(operation)).epoch == 1
    assert calls.done == ["a", "b", "c"]


async def test_an_operation_whose_end_cannot_be_recorded_is_given_up_and_the_instance_is_free(bench: Bench) -> None:
    calls = Calls()

    async def build(run: Run) -> None:
        await run.step("a", calls.do, "a", undo=calls.undo)
        run.note(no_such_column=1)
        await run.settle(VmState.ACTIVE)

    await bench.conductor({Action.CREATE: build})
    operation = await bench.accept_build()
    ended = await bench.finished(operation)
    assert (ended.result, ended.message) == ("Error", "create failed.")
    instance = await instance_fetch(bench.store, operation.instance_id)
    assert (instance.vm_state, instance.task_state) == (VmState.ERROR, None)
    assert instance.facts.fault is not None
    assert "-a" in calls.done
