"""One operation as it runs: steps that replay from the journal, undo in reverse, and the end of it all.

A lifecycle function is called from its beginning each time a conductor takes the operation up. `step` returns what the
journal has, and executes the first that the journal does not have; so the function must depend only on its arguments and
on what steps return. What a step found is committed together with the start of the next one: one transaction a step.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec
import structlog

from instar.bus.contract import Bus
from instar.clock import now_us
from instar.engine.hosts import FellSilent, HostClient, SessionOf, never_silent, no_session, tell_leftovers
from instar.engine.journal import Journal, decode_output
from instar.engine.lease import ensure_lease
from instar.engine.notifications import notification
from instar.errors import (
    Cancelled,
    InstarError,
    LeaseLost,
    StepFailed,
    StepTimeout,
    TaskStateConflict,
    Unavailable,
    WhereaboutsUnknown,
    WrongState,
)
from instar.model.instance import Fault, Flavor, Instance, InstanceSpec
from instar.model.operation import Operation, Step
from instar.model.states import TRANSITIONS, PowerState, TaskState, VmState
from instar.store.console_tokens import console_tokens_revoke
from instar.store.contract import Result, Statement, Store, Value, WriteConflict
from instar.store.guard import guarding
from instar.store.instances import (
    addresses_text,
    encode_facts,
    instance_change,
    instance_change_beside,
    instance_change_spec,
    instance_count,
    instance_fetch,
    instance_hold,
)
from instar.store.operations import (
    GuardRefused,
    notification_insert,
    operation_fetch,
    operation_finish,
    operation_guard,
    step_start,
    step_start_during,
)
from instar.tracing import spans

log = structlog.get_logger()
T = TypeVar("T")

UNDO_DEADLINE_S = 60.0
FOUND_COLUMNS = ("facts", "addresses")
TOLD_COLUMNS = ("host", "power_state", "launched_at", "terminated_at")


class Interrupted(Exception):
    """The database is away: nothing is decided, nothing is undone. The operation goes on when it is taken up again."""


class _Undo(NamedTuple):
    name: str
    call: Callable[..., Awaitable[object]]
    args: tuple[Any, ...]
    participant: str
    host: str | None


class Run:
    """`instance` is as it was when this run began; what the operation itself changes comes from step results."""

    def __init__(
        self,
        operation: Operation,
        instance: Instance,
        steps: list[Step],
        *,
        store: Store,
        bus: Bus,
        step_deadline_s: float,
        told: Callable[[], None] = lambda: None,
        fell_silent: FellSilent = never_silent,
        session_of: SessionOf = no_session,
    ) -> None:
        self.operation = operation
        self.instance = instance
        self.hosts = HostClient(
            bus, instance_id=instance.id, epoch=operation.epoch, deadline_s=step_deadline_s, fell_silent=fell_silent,
            session_of=session_of,
        )  # fmt: skip
        self.facts = instance.facts
        # As it is now, not as the API saw it: what was accepted without a task_state may have ended meanwhile.
        self.failed_state = TRANSITIONS[operation.rule].fails or instance.vm_state
        self.has_secrets = False  # its arguments are forgotten when it ends
        self.settled = False
        self.next_operation_id: str | None = None
        self._store = store
        self._bus = bus
        self._step_deadline_s = step_deadline_s
        self._journal = Journal(operation.id, steps)
        self._task: TaskState | None = TRANSITIONS[operation.rule].task
        self._row_task = instance.task_state  # what the database has: every write compares and swaps
        self._undos: list[_Undo] = []
        self._changes: dict[str, Value] = {}
        self._found: dict[str, Value] = {}  # all that was changed by this operation, committed or not
        self._told = told  # called when there is something in the outbox
        self._pending: list[Statement] = []
        self._also: list[Statement] = []
        self._when_failed: list[Statement] = []
        self._keeps = False
        self._spec_now = instance.spec  # for those who are told of the end
        self._has_task = self._task is not None  # else it leaves the task_state to whoever waits for its turn
        self._executing: asyncio.Future[Any] | None = None
        self._cancelled_by: str | None = None

    # --- what a lifecycle function calls ----------------------------------------------------------------------------

    async def step(
        self,
        name: str,
        call: Callable[..., Awaitable[T]],
        /,
        *args: Any,
        undo: Callable[..., Awaitable[object]] | None = None,
        task: TaskState | None = None,
        on: str | None = None,
        deadline_s: float | None = None,
    ) -> T:
        """Do `call(*args)` once, and remember what it returned. `task` is the task_state from its start on, `on` the
        participant that does it (else what the call belongs to says). A call to a host names the host first.

        `undo(*args)` is called when the operation fails later, or fails in this very step: it must stand a call that
        has done nothing, or only half. Raises what the call raises, StepTimeout after `deadline_s`, Cancelled when
        another operation takes over, LeaseLost when another conductor did, Interrupted when the database is away."""
        name = self._journal.unique(name)
        participant = on or str(getattr(getattr(call, "__self__", None), "participant", "conductor"))
        host = args[0] if participant == HostClient.participant else None
        undoing = _Undo(name, undo, args, participant, host) if undo else None
        recorded = self._journal.get(name)
        if recorded is not None and recorded.result is not None:
            return self._replay(recorded, call, undoing)
        self._task = task or self._task
        await self._begin(name, participant, host)
        if undoing:
            self._undos.append(undoing)
        return await self._execute(name, call, args, deadline_s or self._step_deadline_s, forward=True)

    def note(self, *, facts: dict[str, Any] | None = None, **columns: Value) -> None:
        """Change the instance's row with the next transaction: `facts` by field, columns by name."""
        if facts:
            self.facts = msgspec.structs.replace(self.facts, **facts)
            self._changes["facts"] = encode_facts(self.facts)
            self._changes["addresses"] = addresses_text(self.facts)
        self._changes.update(columns)
        self._found.update(columns)

    def also(self, *statements: Statement) -> None:
        """Statements that join the next transaction, like a note. They must stand being written again after a crash."""
        self._also.extend(statements)

    def when_failed(self, *statements: Statement) -> None:
        """Statements that join the transaction in which the operation ends, should it fail from here on."""
        self._when_failed.extend(statements)

    def took(self, name: str, undo: Callable[..., Awaitable[object]], *args: Any, on: str) -> None:
        """Something was taken for this operation when it was accepted: `undo(*args)` gives it back, should it fail. To be
        said before the first step; `on` is the participant that has it."""
        self._undos.append(_Undo(name, undo, args, on, None))

    def keep(self) -> None:
        """The point of no return: from the next step on, what was done until here is not undone any more, whatever comes.

        What must be known of it then (a new host) is noted at the same time: both are committed with that step's start."""
        self._keeps = True

    def _past_keep(self) -> None:
        """A step has begun: if it is the first after the point of no return, there is no way back from now on."""
        if self._keeps:
            self._keeps = False
            self._undos.clear()
            self._when_failed.clear()

    def check_begin(self) -> None:
        """An operation that waited for its turn finds the instance as it was accepted, or fails. Raises WrongState,
        WhereaboutsUnknown."""
        allowed = TRANSITIONS[self.operation.rule].vm_states
        if self.instance.maybe_on and not TRANSITIONS[self.operation.rule].anywhere:
            raise WhereaboutsUnknown(id=self.instance.id)
        if allowed and self.instance.vm_state not in allowed:
            raise WrongState(
                action=self.operation.action, id=self.instance.id, attribute="vm_state", state=self.instance.vm_state.value
            )

    async def change_spec(self, change: Callable[[InstanceSpec], InstanceSpec], counted: Flavor | None = None) -> None:
        """Change what the user asked for (a new flavor, another image) in a transaction of its own: for a step. The API may
        change other parts of it at the same time: nothing of either is lost.

        `counted`: a flavor by which the instance counts in its project's usage besides the new one (the larger of each)."""
        guard = operation_guard(self.operation, forward=False)
        while True:
            current = await self.current_instance()
            spec = change(current.spec)
            flavors = (spec.flavor, counted or spec.flavor)
            count = instance_count(
                current.id, max(one.vcpus for one in flavors), max(one.memory_mib for one in flavors)
            )
            try:
                await self._write((guard, *count, instance_change_spec(current, spec)))
            except WriteConflict:
                continue  # another part of it was changed meanwhile
            self._spec_now = spec
            return

    @asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        """If the block fails, its steps are undone before the error goes on: what was before the block stands."""
        mark = len(self._undos)
        try:
            yield
        except (LeaseLost, Cancelled, Interrupted):
            raise  # not ours any more; or all of the operation is unwound, not just this block; or nothing is
        except Exception:
            await self._unwind(mark)
            raise

    async def settle(
        self,
        vm_state: VmState | None = None,
        *,
        power_state: PowerState | None = None,
        fault: InstarError | None = None,
        also: tuple[Statement, ...] = (),
    ) -> None:
        """End the operation well: stable state, no task, record and notification in one transaction. `vm_state` None: as it
        began.

        `fault`: it ended in that state, but not as asked; the record says Error. `also` joins the transaction."""
        vm_state = vm_state or self.instance.vm_state
        self._changes["vm_state"] = vm_state.value
        self._changes["progress"] = 0
        if power_state is not None:
            self.note(power_state=int(power_state))
        self.note(facts={"fault": _fault(fault) if fault else None})
        finish = operation_finish(
            self.operation.id, result="Error" if fault else "Success", message=fault.message if fault else None,
            forget=self.has_secrets,
        )  # fmt: skip
        phase = "error" if fault else "end"
        told = notification(self._instance_now(), self.operation, phase, vm_state, self.facts, fault)
        guard = operation_guard(self.operation, forward=True)
        rest = (finish, notification_insert(told, self.operation.owner))
        statements = (guard, *self._pending, *self._also, *also, *self._revocation(), self._change(None), *rest)
        results = await self._write(statements)
        self._ended(results[-2])

    # --- what the conductor calls -----------------------------------------------------------------------------------

    async def fail(self, error: Exception) -> None:
        """Unwind everything, put the instance back and record why. The instance's own state, where it is still ours."""
        await self._unwind(0)
        shown = error if isinstance(error, InstarError) else StepFailed(step=self.operation.action)
        finish = operation_finish(self.operation.id, result="Error", message=shown.message, forget=self.has_secrets)
        guard = operation_guard(self.operation, forward=False)
        ours = not isinstance(error, Cancelled | TaskStateConflict)
        told = notification(self._instance_now(), self.operation, "error", self.failed_state, self.facts, shown)
        before, rest = tuple(self._when_failed), (finish, notification_insert(told, self.operation.owner))
        if ours:
            self._changes["vm_state"] = self.failed_state.value
            self._changes["progress"] = 0
            self.note(facts={"fault": _fault(shown, error)})
            try:
                changes = (*before, *self._revocation(), self._change(None))
                results = await self._write((guard, *self._pending, *changes, *rest))
            except TaskStateConflict:
                ours = False
        if not ours:
            # What it found is its own also where the states are another's: it alone writes the facts.
            found = {name: self._changes[name] for name in FOUND_COLUMNS if not self._has_task and name in self._changes}
            # Either holds the instance, so that the end sees an operation that is accepted at this moment.
            beside = instance_change_beside(self.instance.id, found) if found else instance_hold(self.instance.id)
            results = await self._write((guard, *self._pending, *before, beside, *rest))
        self._ended(results[-2])

    async def give_up(self, error: Exception) -> None:
        """What it found cannot be written, again and again: a defect. Only that it failed is recorded, so that it ends;
        what it left on hosts is the reconciler's."""
        for waiting in (self._pending, self._also, self._when_failed):
            waiting.clear()
        self._changes = {"vm_state": self.failed_state.value, "progress": 0}
        self.facts = self.instance.facts
        shown = StepFailed(step=self.operation.action)
        self.note(facts={"fault": _fault(shown, error)})
        finish = operation_finish(self.operation.id, result="Error", message=shown.message, forget=self.has_secrets)
        guard = operation_guard(self.operation, forward=False)
        results = await self._write((guard, self._change(None), finish))
        self._ended(results[-1])

    def cancel(self, by: str) -> None:
        """Another operation takes over: the step at hand ends now, as Cancelled."""
        self._cancelled_by = by
        if self._executing is not None:
            self._executing.cancel()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _replay(self, step: Step, call: Callable[..., Awaitable[T]], undoing: _Undo | None) -> T:
        self._task = TaskState(step.task_state) if step.task_state else self._task
        self._changes.clear()  # committed with the start of this step
        self._also.clear()
        self._past_keep()
        if undoing:
            self._undos.append(undoing)
        if step.result == "Error":
            raise self._journal.error_of(step)
        return decode_output(step, call)

    async def _begin(self, name: str, participant: str, host: str | None, *, forward: bool = True) -> None:
        """Commit what the last step found, the changes of the row and the start of this step, in one transaction."""
        if forward and self._cancelled_by:
            raise Cancelled(by=self._cancelled_by)
        statements = [operation_guard(self.operation, forward=forward), *self._pending]
        started = self._journal.get(name)
        # Most steps change nothing of the instance's row, which is dear to write.
        changes = forward and bool(started or self._changes or (self._has_task and self._task != self._row_task))
        if started is None:
            started = self._journal.start(name, participant, host, self._task)
            if forward and self._has_task and not changes:
                statements.append(step_start_during(started, self.instance.id, self._task))
            else:
                statements.append(step_start(started))
            if started.seq == 0:
                told = notification(self.instance, self.operation, "start", self.instance.vm_state, self.facts, None)
                statements.append(notification_insert(told, self.operation.owner))
        if forward:
            statements += [*self._also, *self._revocation(), *((self._change(self._task),) if changes else ())]
        try:
            await self._write(tuple(statements))
        except Exception:
            self._journal.forget(name)
            raise
        self._pending.clear()
        if started.seq == 0:
            self._told()
        if forward:
            self._row_task = self._task
            self._changes.clear()
            self._also.clear()
            self._past_keep()

    async def _execute(
        self, name: str, call: Callable[..., Awaitable[T]], args: tuple[Any, ...], limit_s: float, *, forward: bool
    ) -> T:
        if forward and self._cancelled_by:  # told while the start of this step was being written
            raise self._failed(name, Cancelled(by=self._cancelled_by))
        self.hosts.hypervisor_us = 0
        await self._ensure_lease()
        # What the step writes, in whatever service, it writes only while the operation is ours.
        with guarding(operation_guard(self.operation, forward=False)), spans.span(f"step {name}"):
            executing = asyncio.ensure_future(call(*args))
            return await self._result_of(name, executing, limit_s, forward=forward)

    async def _ensure_lease(self) -> None:
        """Nothing is begun by a conductor that was slow for so long that somebody else may own the operation."""
        try:
            await ensure_lease()
        except Unavailable as error:
            raise Interrupted from error

    async def _result_of(self, name: str, executing: asyncio.Future[T], limit_s: float, *, forward: bool) -> T:
        self._executing = executing if forward else None  # an undo is never cancelled: what takes over waits for it
        try:
            async with asyncio.timeout(limit_s) as deadline:
                output = await executing
        except asyncio.CancelledError:
            task = asyncio.current_task()
            stopping = task is not None and task.cancelling() > 0
            if not forward or self._cancelled_by is None or stopping or not executing.cancelled():
                raise  # the process stops: the journal has the start, the next run goes on from here
            raise self._failed(name, Cancelled(by=self._cancelled_by)) from None
        except Unavailable as error:
            raise Interrupted from error
        except (GuardRefused, LeaseLost):
            raise LeaseLost(id=self.operation.id) from None
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                error = StepTimeout(what=f"step '{name}'", waited_s=limit_s)
            raise self._failed(name, error) from error
        finally:
            self._executing = None
        self._pending.append(self._journal.succeed(name, output, self.hosts.hypervisor_us))
        return output

    def _failed(self, name: str, error: Exception) -> Exception:
        """Record the failure of a step; an error that nobody defined becomes StepFailed, its traceback kept."""
        trace = "".join(traceback.format_exception(error))
        if not isinstance(error, InstarError):
            log.error("step.crashed", operation=self.operation.action, step=name, exc_info=error)
            error = StepFailed(step=f"Step '{name}'")
        self._pending.append(self._journal.fail(name, error, trace, self.hosts.hypervisor_us))
        return error

    async def _unwind(self, mark: int) -> None:
        """Undo in reverse what was done since `mark`. An undo that fails is recorded, and left to the reconciler."""
        while len(self._undos) > mark:
            undo = self._undos.pop()
            name = self._journal.unique(f"undo {undo.name}")
            recorded = self._journal.get(name)
            if recorded is not None and recorded.result is not None:
                continue
            await self._begin(name, undo.participant, undo.host, forward=False)
            try:
                await self._execute(name, undo.call, undo.args, UNDO_DEADLINE_S, forward=False)
            except LeaseLost:
                raise  # whoever owns the operation now does what is not undone yet
            except InstarError as error:
                log.warning("undo.failed", operation=self.operation.action, step=undo.name, reason=error.message)
                if undo.host:
                    await tell_leftovers(self._bus, undo.host)

    def _instance_now(self) -> Instance:
        """The instance with what this operation found, for those who are told of its end."""
        known = {name: self._found[name] for name in TOLD_COLUMNS if name in self._found}
        if "power_state" in known:
            known["power_state"] = PowerState(known["power_state"])  # type: ignore[arg-type]
        return msgspec.structs.replace(self.instance, spec=self._spec_now, **known)

    def _change(self, task: TaskState | None) -> Statement:
        if not self._has_task:
            return instance_change_beside(self.instance.id, self._changes)
        return instance_change(self.instance.id, self._row_task, task, self._changes)

    def _revocation(self) -> tuple[Statement, ...]:
        """Who was given a way to the guest's console loses it when the guest stops, moves or is gone."""
        changes = self._changes
        here = changes.get("host", self.instance.host) == self.instance.host and not changes.get("deleted")
        if here and changes.get("power_state", PowerState.RUNNING) in (PowerState.RUNNING, PowerState.PAUSED):
            return ()
        return (console_tokens_revoke(self.instance.id),)

    async def _write(self, statements: tuple[Statement, ...]) -> list[Result]:
        try:
            return await self._store.write(*statements)
        except Unavailable as error:
            raise Interrupted from error
        except GuardRefused:
            current = await operation_fetch(self._store, self.operation.id)
            mine = current and (current.owner, current.epoch) == (self.operation.owner, self.operation.epoch)
            if current and mine and current.finished_at is None and current.cancelled_by:
                raise Cancelled(by=current.cancelled_by) from None
            raise LeaseLost(id=self.operation.id) from None

    def _ended(self, finished: Result) -> None:
        self.settled = True
        self._pending.clear()
        self.next_operation_id = finished.rows[0]["next_id"]

    async def current_instance(self) -> Instance:
        """The row as it is now, for a step that must read it."""
        return await instance_fetch(self._store, self.instance.id)


def _fault(error: InstarError, cause: Exception | None = None) -> Fault:
    """The message is for users, and names no host; the details are for admins."""
    details = error.facts.get("details", "")
    if isinstance(details, list | tuple):
        details = "\n".join(str(line) for line in details)
    code = error.status if error.status >= 400 else 500
    message = error.user_message
    if message != error.message:
        details = f"{error.message}\n{details}".rstrip()
    return Fault(code=code, message=message[:255], created_at=now_us(), details=str(details))
