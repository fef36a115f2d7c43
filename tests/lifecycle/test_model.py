"""Random users, admins and accidents on three hosts, held against the contract's table of transitions.

Each action is accepted exactly when the table says so of the state at that moment, and refused with the table's sentence;
when everything has settled no instance is in between, hosts and records agree, and nothing is left of what was deleted.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from instar.config import LifecycleSettings, QuotaSettings
from instar.errors import Conflict, InstarError, Locked, WrongState
from instar.model.context import RequestContext
from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from tests.lifecycle.harness import SETTINGS, Plane, plane
from tests.lifecycle.watching import check_no_trace, faults

T = TypeVar("T")

QUICK = msgspec.structs.replace(
    SETTINGS,
    quota=QuotaSettings(instances=5, cores=-1, ram=-1),
    lifecycle=LifecycleSettings(wait_soft_reboot_seconds=0.05, shutdown_grace_s=0.05),
)
INSTANCES_MAX = 5
HARD_REBOOT_DURING = {
    None, "rebooting", "reboot_pending", "reboot_started", "rebooting_hard", "reboot_pending_hard",
    "reboot_started_hard", "pausing", "unpausing", "suspending", "resuming",
}  # fmt: skip
ALLOWED: dict[str, Callable[[str, str | None], bool]] = {
    "start": lambda vm, task: vm == "stopped" and task is None,
    "stop": lambda vm, task: vm in ("active", "error") and task is None,
    "soft": lambda vm, task: vm == "active" and task is None,
    "hard": lambda vm, task: vm in ("active", "stopped", "paused", "suspended", "error") and task in HARD_REBOOT_DURING,
    "delete": lambda vm, _task: vm != "deleted",
}
BEGINS = {
    "start": {"stopped"}, "stop": {"active", "error"}, "soft": {"active"},
    "hard": {"active", "stopped", "paused", "suspended", "error"},
    "delete": {state.value for state in VmState} - {"deleted"},
}  # fmt: skip
NAMES = {"soft": "reboot", "hard": "reboot"}
STABLE = {VmState.ACTIVE, VmState.STOPPED, VmState.PAUSED, VmState.ERROR, VmState.DELETED}
METHODS = [
    "ensure_disk", "ensure_ports", "ensure_running", "ensure_restarted", "ensure_stopped", "ensure_absent", "observe",
]  # fmt: skip

whose = st.integers(0, INSTANCES_MAX - 1)
actions = st.sampled_from(sorted(ALLOWED))
hosts = st.sampled_from(["sim-0", "sim-1", "sim-2"])


def refusal(action: str, instance: Instance) -> str:
    """The sentence of the contract for an action that the instance's state forbids."""
    vm_state, task = instance.vm_state.value, instance.task_state.value if instance.task_state else "None"
    stands = f"vm_state {vm_state}" if vm_state not in BEGINS[action] else f"task_state {task}"
    return f"Cannot '{NAMES.get(action, action)}' instance {instance.id} while it is in {stands}"


class Cloud(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="instar-model-"))
        self.stack = AsyncExitStack()
        self.ids: list[str] = []
        self.deleted: set[str] = set()  # a delete was accepted, and no admin meddled since
        self.one: Plane

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def begin(self) -> None:
        async def begin() -> None:
            image = self.directory / "disk.raw"
            image.write_bytes(bytes(4096))
            self.one = await self.stack.enter_async_context(plane(self.directory / "cloud", QUICK))
            await self.one.prepare(image)

        self.run(begin())

    # --- users --------------------------------------------------------------------------------------------------------

    def context(self, admin: bool) -> RequestContext:
        return self.one.context("admin", ("admin", "member", "reader")) if admin else self.one.context()

    def act(self, action: str, instance: Instance, *, admin: bool) -> Awaitable[None]:
        door, context = self.one.control.lifecycle, self.context(admin)
        if action in NAMES:
            return door.reboot(context, instance, hard=action == "hard")
        return {"start": door.start, "stop": door.stop, "delete": door.delete}[action](context, instance)  # type: ignore[no-any-return]

    @precondition(lambda self: len(self.ids) < INSTANCES_MAX)
    @rule()
    def create(self) -> None:
        self.ids.append(self.run(self.one.create(f"guest-{len(self.ids)}")).id)

    @precondition(lambda self: self.ids)
    @rule(number=whose, action=actions, admin=st.booleans())
    def one_action(self, number: int, action: str, admin: bool) -> None:
        async def check() -> None:
            instance = await self.one.fetch(self.ids[number % len(self.ids)])
            vm_state, task = instance.vm_state.value, instance.task_state.value if instance.task_state else None
            allowed = ALLOWED[action](vm_state, task)
            try:
                await self.act(action, instance, admin=admin)
            except Locked as error:
                assert instance.locked_by and not admin
                assert error.message == f"Instance {instance.id} is locked"
            except WrongState as error:
                if allowed:  # only because it is another state by now
                    assert error.message.endswith("in task_state changed meanwhile")
                    now = await self.one.fetch(instance.id)
                    before = (instance.vm_state, instance.task_state, instance.turn)
                    assert (now.vm_state, now.task_state, now.turn) != before
                else:
                    assert error.message == refusal(action, instance)
            except Conflict:
                assert instance.host is None, "refused without a reason"
            else:
                assert allowed, f"{action} was accepted in {vm_state}, {task}"
                assert admin or not instance.locked_by
                if action == "delete":
                    self.deleted.add(instance.id)

        self.run(check())

    @precondition(lambda self: self.ids)
    @rule(number=whose, chosen=st.lists(actions, min_size=2, max_size=4))
    def several_actions_at_once(self, number: int, chosen: list[str]) -> None:
        async def check() -> None:
            instance = await self.one.fetch(self.ids[number % len(self.ids)])
            done = await asyncio.gather(
                *(self.act(action, instance, admin=False) for action in chosen), return_exceptions=True
            )
            for action, outcome in zip(chosen, done, strict=True):
                assert outcome is None or isinstance(outcome, Conflict), (action, outcome)
                if action == "delete" and outcome is None:
                    self.deleted.add(instance.id)
            accepted = [action for action, outcome in zip(chosen, done, strict=True) if outcome is None]
            begun = [action for action in accepted if action in ("start", "stop", "soft")]
            assert len(begun) <= 1, f"{begun} began at once"

        self.run(check())

    @precondition(lambda self: self.ids)
    @rule(number=whose, admin=st.booleans(), lock=st.booleans())
    def lock_or_unlock(self, number: int, admin: bool, lock: bool) -> None:
        async def check() -> None:
            instance = await self.one.fetch(self.ids[number % len(self.ids)])
            if instance.vm_state is VmState.DELETED:
                return
            door, context = self.one.control.lifecycle, self.context(admin)
            try:
                await (door.lock(context, instance, None) if lock else door.unlock(context, instance))
            except Locked:
                assert not lock
                assert not admin
                assert instance.locked_by == "admin"
            except Conflict:
                assert (await self.one.fetch(instance.id)).vm_state is VmState.DELETED
            else:
                now = await self.one.fetch(instance.id)
                assert bool(now.locked_by) is lock or now.vm_state is VmState.DELETED

        self.run(check())

    @precondition(lambda self: self.ids)
    @rule(number=whose, state=st.sampled_from([VmState.ACTIVE, VmState.ERROR]))
    def reset_state(self, number: int, state: VmState) -> None:
        async def reset() -> None:
            instance = await self.one.fetch(self.ids[number % len(self.ids)])
            if instance.vm_state is VmState.DELETED:
                return
            try:
                await self.one.control.lifecycle.reset_state(self.context(admin=True), instance, state)
            except InstarError as error:
                assert error.status == 404  # it was deleted at that moment
                return
            self.deleted.discard(instance.id)

        self.run(reset())

    # --- accidents ----------------------------------------------------------------------------------------------------

    @rule(host=hosts, method=st.sampled_from(METHODS), after_work=st.booleans())
    def next_call_fails(self, host: str, method: str, after_work: bool) -> None:
        faults(self.one, host).fail_next(method, after_work=after_work)

    @rule(host=hosts)
    def hypervisor_goes_away_or_returns(self, host: str) -> None:
        trouble = faults(self.one, host)

        async def turn() -> None:
            trouble.down = not trouble.down

        self.run(turn())

    @precondition(lambda self: self.ids)
    @rule(number=whose, how=st.sampled_from(["powers_off", "dies", "vanishes", "pauses", "resumes", "reboots"]))
    def guest_does_something_by_itself(self, number: int, how: str) -> None:
        async def happen() -> None:
            instance = await self.one.fetch(self.ids[number % len(self.ids)])
            if instance.host is not None:
                getattr(faults(self.one, instance.host), f"guest_{how}")(instance.id)

        self.run(happen())

    @rule(host=hosts, deaf=st.booleans())
    def guests_hear_the_power_button_or_not(self, host: str, deaf: bool) -> None:
        faults(self.one, host).ignores_acpi = deaf

    @rule(ms=st.integers(0, 30))
    def time_passes(self, ms: int) -> None:
        self.run(asyncio.sleep(ms / 1000))

    @rule()
    def everything_settles(self) -> None:
        self.run(self.check_settled())

    # --- what must be so ----------------------------------------------------------------------------------------------

    async def check_settled(self) -> None:
        for host in self.one.hosts:
            faults(self.one, host).clear()
        await self.one.settled()
        for host in self.one.hosts:  # what the timer would do
            await self.one.control.reconciler.reconcile_host(host)
        await self.one.settled()
        assert await self.one.findings() == []
        for instance_id in self.ids:
            instance = await self.one.fetch(instance_id)
            assert instance.vm_state in STABLE, instance.vm_state
            assert instance.task_state is None
            if instance_id in self.deleted:
                assert instance.vm_state is VmState.DELETED or instance.facts.fault is not None
            if instance.host is not None:
                state = await self.one.world.host(instance.host).observe(instance_id)
                assert agrees(instance.vm_state, state.power_state), (instance.vm_state, state)

    def teardown(self) -> None:
        try:
            if hasattr(self, "one"):
                self.run(self.end())
        finally:
            self.run(self.stack.aclose())
            self.loop.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    async def end(self) -> None:
        await self.check_settled()
        for instance_id in self.ids:
            instance = await self.one.fetch(instance_id)
            if instance.vm_state is not VmState.DELETED:
                await self.one.control.lifecycle.delete(self.context(admin=True), instance)
        await self.one.settled()
        assert {(await self.one.fetch(instance_id)).vm_state for instance_id in self.ids} <= {VmState.DELETED}
        await check_no_trace(self.one)


def agrees(vm_state: VmState, power: PowerState) -> bool:
    if vm_state is VmState.ACTIVE:
        return power is PowerState.RUNNING
    if vm_state is VmState.PAUSED:
        return power is PowerState.PAUSED
    return vm_state is VmState.ERROR or power not in (PowerState.RUNNING, PowerState.PAUSED)


TestRandomLives = pytest.mark.slow(Cloud.TestCase)
TestRandomLives.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
