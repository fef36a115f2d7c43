"""A conductor: takes operations from the queue, runs them, and takes over what another one left unfinished.

Ownership: an operation belongs to one conductor, under an epoch that grows with each change of hands. A conductor shows
that it lives by a number that it counts up in the database; one whose number stands still for a lease's time, by the
watcher's own clock, loses its registration, and with it its operations: whoever has room takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import structlog

from instar.bus.contract import Bus, Message, NobodyListens, Reply, Subscription
from instar.config import EngineSettings
from instar.engine.hosts import FellSilent, SessionOf, never_silent, no_session
from instar.engine.lease import Lease, act_under
from instar.engine.notifications import Outbox
from instar.engine.run import Interrupted, Run
from instar.errors import LeaseLost, Unavailable
from instar.metrics import numbers
from instar.model.commands import CANCEL_TOPIC, CONDUCTOR_LEFT_TOPIC, CONDUCTOR_QUEUE
from instar.model.instance import Instance, instance_from_row
from instar.model.operation import Operation, OperationAccepted, operation_from_row
from instar.store.conductors import (
    conductor_evict,
    conductor_remove,
    conductors_fetch,
    operations_owned,
    operations_to_take,
)
from instar.store.contract import Store, WriteConflict
from instar.store.instances import instance_fetch, instance_take_epoch
from instar.store.operations import operation_fetch, operation_take, steps_fetch
from instar.tracing import ids, spans

log = structlog.get_logger()

LifecycleFunction = Callable[[Run], Awaitable[None]]
Taken = Callable[[Run], None]
Clock = Callable[[], float]
BEATS_PER_LEASE = 4
LOOKS_PER_LEASE = 12  # at the beats of others: one that dies is noticed so much later than its lease, at most
BLIND_LOOKS = 4  # who could not look for so many looks knows nothing of how long others were silent
TAKEN_AT_ONCE = 16  # of what another one left
REGISTER_AGAIN_S = 0.5
DEFECTS_MAX = 3


class Conductor:
    """`functions` has the lifecycle function of each action; `taken`, where something was taken when an operation was
    accepted, tells the run of it before all else (`Run.took`). `alone`: no other process uses this database, so whatever
    is owned by somebody else belongs to a process that is dead. `fell_silent` knows which hosts show no life any more,
    `session_of` which session a host is in."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        functions: Mapping[str, LifecycleFunction],
        settings: EngineSettings,
        *,
        alone: bool,
        taken: Mapping[str, Taken] | None = None,
        monotonic: Clock = time.monotonic,
        fell_silent: FellSilent = never_silent,
        session_of: SessionOf = no_session,
    ) -> None:
        self.lease = Lease(store, settings.lease_s)
        self._store = store
        self._bus = bus
        self._functions = functions
        self._taken = taken or {}
        self._settings = settings
        self._alone = alone
        self._monotonic = monotonic
        self._fell_silent = fell_silent
        self._session_of = session_of
        self._outbox = Outbox(store, bus, lambda: self.lease.id)
        self._running: dict[str, tuple[Run | None, asyncio.Task[None]]] = {}
        self._taking: set[str] = set()
        self._asked_again: set[str] = set()  # of those, what was to be taken once more meanwhile
        self._slots = asyncio.Semaphore(settings.operations_max)
        self._loops: list[asyncio.Task[None]] = []
        self._subscriptions: list[Subscription] = []
        self._defects: dict[str, int] = {}  # how often the end of an operation could not be recorded
        self._seen_beats: dict[str, tuple[int, float]] = {}
        self._looked_at = float("-inf")
        self._seen_unowned: set[str] = set()
        self._work_left = asyncio.Event()  # somebody is gone: look at once for what it left
        self._before_leaving: list[Callable[[], Awaitable[None]]] = []
        self._joined = self._closing = False

    @property
    def id(self) -> str:
        """Of this registration: another one after a lease that was lost."""
        return self.lease.id

    @property
    def peers(self) -> list[str]:
        """The conductors that were registered when they were looked at last, in an order that all of them see."""
        return sorted({*self._seen_beats, self.id})

    def before_leaving(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call this when the conductor closes, while it is still registered."""
        self._before_leaving.append(call)

    async def join(self) -> None:
        """Register, and show life from now on: what opens before the conductor itself may take longer than a lease.
        `open` does it where it was not done before."""
        if not self._joined:
            await self.lease.acquire(alone=self._alone)
            self._joined = True
            self._loops.append(asyncio.create_task(self._beat(), name="conductor beat"))

    async def open(self) -> None:
        """Register, take over what is unfinished, and serve the queue."""
        await self.join()
        await self._look_for_work(first=True)
        self._subscriptions = [
            await self._bus.subscribe(CANCEL_TOPIC, self._on_cancel),
            await self._bus.subscribe(CONDUCTOR_LEFT_TOPIC, self._on_left),
            await self._bus.serve(CONDUCTOR_QUEUE, self._on_accepted, concurrency_max=self._settings.operations_max),
        ]
        self._loops += [
            asyncio.create_task(self._watch(), name="conductor watch"),
            asyncio.create_task(self._poll(), name="conductor poll"),
            asyncio.create_task(self._outbox.run(), name="conductor outbox"),
        ]

    async def close(self) -> None:
        """Stop. What is in flight stays in the journal, for the next that starts; another conductor takes it at once. Also
        of one that has only joined; may be called again."""
        self._closing = True
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.cancel()
        for call in self._before_leaving:
            await call()
        tasks = [*self._loops, *(task for _, task in self._running.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._joined:
            return
        self._joined = False
        try:
            await self._store.write(conductor_remove(self.id))
            await self._bus.publish(CONDUCTOR_LEFT_TOPIC, Message("ConductorLeft", self.id.encode()))
        except Exception as error:
            log.warning("conductor.left_without_a_word", conductor=self.id, reason=str(error))

    @property
    def in_flight(self) -> list[str]:
        """Ids of the operations that run here."""
        return list(self._running)

    # --- taking operations ------------------------------------------------------------------------------------------

    async def _on_accepted(self, message: Message) -> Reply:
        accepted = msgspec.msgpack.decode(message.body, type=OperationAccepted)
        await self._slots.acquire()  # back-pressure: an operation waits in the queue until there is room for it
        self._slots.release()
        try:
            await self._take(accepted.operation_id, None)
        except (Unavailable, LeaseLost) as error:  # it is in the database: somebody's poll finds it there
            log.warning("operation.not_taken", operation=accepted.operation_id, reason=error.message)
        return Reply()

    async def _take(self, operation_id: str, from_owner: str | None) -> None:
        """Own and start an operation, unless someone else does or an older one of the instance is still unfinished."""
        if operation_id in self._running or self._closing:
            return
        if operation_id in self._taking:
            # Refused perhaps, and its turn has come since: the one that it waited for tells of it only once.
            self._asked_again.add(operation_id)
            return
        # Between the commit that makes it ours and our hearing of it, the poll must not take it for one that we lost.
        self._taking.add(operation_id)
        try:
            await self._take_and_start(operation_id, from_owner)
            while operation_id in self._asked_again and operation_id not in self._running:
                self._asked_again.discard(operation_id)
                await self._take_and_start(operation_id, from_owner)
        finally:
            self._taking.discard(operation_id)
            self._asked_again.discard(operation_id)

    async def _take_and_start(self, operation_id: str, from_owner: str | None) -> None:
        lease = self.lease
        await lease.ensure()
        try:
            results = await self._store.write(
                operation_take(operation_id, lease.id, from_owner=from_owner), instance_take_epoch(operation_id)
            )
        except WriteConflict:
            operation = await operation_fetch(self._store, operation_id)
            if operation is not None and operation.finished_at is None:
                await tell_to_cancel(self._bus, operation.instance_id, operation.action)
            return
        if self._closing or lease is not self.lease:  # it is ours in the record: whoever comes next takes it from there
            return
        taken = operation_from_row(results[0].rows[0])  # type: ignore[arg-type]
        if from_owner is not None:
            numbers.lease_changed("taken_over")
            log.info("operation.taken_over", action=taken.action, instance=taken.instance_id, epoch=taken.epoch)
        # One that was never owned has no journal. Where it has to wait for a slot, its instance is read when it begins.
        instance = None if self._slots.locked() else instance_from_row(results[1].rows[0])  # type: ignore[arg-type]
        run = self._run(taken, instance, lease, fresh=from_owner is None)
        task = asyncio.create_task(run, name=f"{taken.action} {taken.instance_id}")
        self._running[operation_id] = (None, task)

    async def _on_cancel(self, message: Message) -> None:
        instance_id, by = msgspec.msgpack.decode(message.body, type=tuple[str, str])
        for run, _ in list(self._running.values()):
            if run is None or run.instance.id != instance_id:
                continue
            current = await operation_fetch(self._store, run.operation.id)
            if current is not None and current.cancelled_by:
                run.cancel(by)

    # --- running one ------------------------------------------------------------------------------------------------

    async def _run(self, operation: Operation, instance: Instance | None, lease: Lease, *, fresh: bool) -> None:
        mandate = act_under(lease)
        following: str | None = None
        ids.bind(operation.request_id, operation_id=operation.id)  # a task, and so a context, of its own
        parent = ids.first_span_of(operation.request_id, sampled=True)
        numbers.operation_began()
        try:
            async with self._slots:
                with spans.span(
                    f"operation {operation.action}", parent=parent, **{"instar.operation_id": operation.id}
                ):
                    following = await self._run_to_its_end(operation, instance, fresh=fresh)
        except asyncio.CancelledError:
            raise
        except Exception:
            # The database is away, or a defect: the operation stays ours in the record, and the poll takes it up again.
            log.exception("operation.interrupted", action=operation.action, instance=operation.instance_id)
        finally:
            numbers.operation_left()
            self._running.pop(operation.id, None)
            mandate.over = True
        if following:
            await self._take(following, None)

    async def _run_to_its_end(self, operation: Operation, instance: Instance | None, *, fresh: bool) -> str | None:
        started = time.monotonic()
        if instance is None:
            instance = await instance_fetch(self._store, operation.instance_id)
        # Nobody has run it before: there is no journal to read.
        steps = [] if fresh else await steps_fetch(self._store, operation.id)
        run = Run(
            operation, instance, steps,
            store=self._store, bus=self._bus, step_deadline_s=self._settings.step_deadline_s,
            told=self._outbox.nudge, fell_silent=self._fell_silent,
            session_of=self._session_of,
        )  # fmt: skip
        task = asyncio.current_task()
        assert task is not None
        self._running[operation.id] = (run, task)
        error: Exception | None = None
        try:
            if operation.action in self._taken:
                self._taken[operation.action](run)
            if fresh:
                run.check_begin()
            await self._functions[operation.action](run)
            assert run.settled, f"{operation.action} returned without settling"
        except LeaseLost:
            numbers.lease_changed("lost")
            log.warning("operation.lease_lost", action=operation.action, instance=instance.id)
            return None
        except Interrupted:
            raise
        except Exception as failure:
            error = failure
            if not run.settled:
                await self._fail(run, failure)
        self._outbox.nudge()
        took_s = time.monotonic() - started
        numbers.operation_ended(operation.action, "ok" if error is None else "failed", took_s)
        took_ms = round(took_s * 1000)
        name, fields = operation.action, {"instance": instance.id, "took_ms": took_ms, "request": operation.request_id}
        if error is None:
            log.info("operation.done", action=name, **fields)
        else:
            log.warning("operation.failed", action=name, reason=str(error), **fields)
        return run.next_operation_id

    async def _fail(self, run: Run, failure: Exception) -> None:
        """Unwind and record. What cannot be recorded for another reason than a database that is away is a defect: it is
        tried again, and then given up, so that the instance is not stuck."""
        operation_id = run.operation.id
        try:
            await run.fail(failure)
            self._defects.pop(operation_id, None)
        except (Interrupted, LeaseLost):
            raise
        except Exception:
            self._defects[operation_id] = self._defects.get(operation_id, 0) + 1
            if self._defects[operation_id] < DEFECTS_MAX:
                raise
            log.exception("operation.given_up", action=run.operation.action, instance=run.instance.id)
            del self._defects[operation_id]
            await run.give_up(failure)

    # --- life and death of conductors -------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / BEATS_PER_LEASE)
            try:
                await self.lease.renew()
            except LeaseLost:
                await self._register_anew()
            except Exception:
                log.exception("conductor.beat_failed")

    async def _register_anew(self) -> None:
        """We were taken for dead, and others have our operations: drop everything, and begin again under another id."""
        log.error("conductor.lease_lost", conductor=self.id, operations=len(self._running))
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # One that was cancelled before it began could not say that it ended: nobody here would take it ever again.
        self._running = {one: entry for one, entry in self._running.items() if not entry[1].done()}
        lease = Lease(self._store, self._settings.lease_s)
        while True:
            try:
                await lease.acquire(alone=False)
                break
            except Exception as error:
                log.warning("conductor.not_registered", reason=str(error))
                await asyncio.sleep(REGISTER_AGAIN_S)
        self.lease = lease
        self._seen_beats.clear()
        self._work_left.set()

    async def _watch(self) -> None:
        """Look at the others' beats; who shows no life for a lease's time is not registered any more."""
        while True:
            await asyncio.sleep(self._settings.lease_s / LOOKS_PER_LEASE)
            try:
                await self._evict_the_silent()
            except Exception:
                log.exception("conductor.watch_failed")

    async def _evict_the_silent(self) -> None:
        beats = await conductors_fetch(self._store)
        now = self._monotonic()
        if now - self._looked_at > BLIND_LOOKS * self._settings.lease_s / LOOKS_PER_LEASE:
            self._seen_beats.clear()
        self._looked_at = now
        self._seen_beats = {one: seen for one, seen in self._seen_beats.items() if one in beats}
        for conductor_id, beat in beats.items():
            seen = self._seen_beats.get(conductor_id)
            if seen is None or seen[0] != beat:
                self._seen_beats[conductor_id] = (beat, now)
            elif now - seen[1] > self._settings.lease_s and conductor_id != self.id and self.lease.held:
                (evicted,) = await self._store.write(conductor_evict(conductor_id, beat))
                if evicted.rowcount:
                    await self._store.end_silent()  # it may have been stopped in the middle of a transaction
                    log.warning("conductor.evicted", conductor=conductor_id, silent_s=round(now - seen[1], 1))
                    self._work_left.set()
                    await self._bus.publish(CONDUCTOR_LEFT_TOPIC, Message("ConductorLeft", conductor_id.encode()))

    async def _on_left(self, message: Message) -> None:
        self._work_left.set()

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await self._work_left.wait()
            self._work_left.clear()
            try:
                await self._look_for_work(first=False)
            except Exception:
                log.exception("conductor.poll_failed")

    async def _look_for_work(self, *, first: bool) -> None:
        """Take what nobody owns who is registered, as much as there is room for; and what is ours and does not run, because
        the database was away when it should have ended. Told operations are found here when the word was lost."""
        for operation_id, cancelled_by in (await operations_owned(self._store, self.id)).items():
            run, _ = self._running.get(operation_id, (None, None))
            if operation_id not in self._running:
                await self._take(operation_id, self.id)
            elif run is not None and cancelled_by:
                run.cancel(cancelled_by)
        room = self._settings.operations_max - len(self._running)
        found = await operations_to_take(self._store, room) if room > 0 else ()
        # One that the last poll has seen, too, is not just on its way here. No clock is asked: it may be another host's.
        seen, self._seen_unowned = self._seen_unowned, {row["id"] for row in found if row["owner"] is None}
        due = [row for row in found if row["owner"] is not None or first or row["id"] in seen]
        for start in range(0, len(due), TAKEN_AT_ONCE):
            some = due[start : start + TAKEN_AT_ONCE]
            await asyncio.gather(*(self._take(row["id"], row["owner"]) for row in some))


async def tell_accepted(bus: Bus, operation: Operation) -> None:
    """Put an accepted operation on the conductors' queue. No conductor there: the next one finds it in the database."""
    body = msgspec.msgpack.encode(OperationAccepted(operation.id, operation.instance_id))
    try:
        await bus.send(CONDUCTOR_QUEUE, Message("OperationAccepted", body))
    except NobodyListens:
        log.warning("conductor.none", action=operation.action, instance=operation.instance_id)


async def tell_to_cancel(bus: Bus, instance_id: str, by: str) -> None:
    """Whoever runs an operation of the instance that was taken over ends its step now, rather than at its next write."""
    await bus.publish(CANCEL_TOPIC, Message("Cancel", msgspec.msgpack.encode((instance_id, by))))
