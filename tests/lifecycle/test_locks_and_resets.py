"""Locks, an admin's reset of the state, and quotas under concurrency."""

from __future__ import annotations

import asyncio

import pytest

from instar.errors import HypervisorError, InstarError, Locked, QuotaExceeded, VolumeFailed
from instar.lifecycle.audit import Kind
from instar.model.context import RequestContext
from instar.model.states import VmState
from instar.store.contract import Statement
from instar.store.instances import usage_fetch
from instar.store.operations import operations_of_instance
from tests.lifecycle.harness import Plane
from tests.lifecycle.watching import Held, check_no_trace, faults


def admin(one: Plane) -> RequestContext:
    return one.context(project="admin", roles=("admin", "member", "reader"))


# --- locks --------------------------------------------------------------------------------------------------------


async def test_locked_instance_refuses_its_owner_and_obeys_an_admin(one: Plane) -> None:
    instance = await one.created()
    lifecycle, owner = one.control.lifecycle, one.context()
    await lifecycle.lock(owner, instance, "mine")
    locked = await one.fetch(instance.id)
    assert (locked.locked_by, locked.spec.locked_reason) == ("owner", "mine")
    for act in (lifecycle.stop, lifecycle.start, lifecycle.delete):
        with pytest.raises(Locked, match=f"Instance {instance.id} is locked") as refused:
            await act(owner, locked)
        assert refused.value.status == 409
    for hard in (False, True):
        with pytest.raises(Locked):
            await lifecycle.reboot(owner, locked, hard=hard)
    await lifecycle.stop(admin(one), locked)
    await one.settled()
    stopped = await one.fetch(instance.id)
    assert (stopped.vm_state, stopped.locked_by) == (VmState.STOPPED, "owner"), "an operation took the lock away"
    await lifecycle.unlock(owner, stopped)
    free = await one.fetch(instance.id)
    assert (free.locked_by, free.spec.locked_reason) == (None, None)
    await lifecycle.start(owner, free)
    await one.settled()
    actions = [operation.action for operation in await operations_of_instance(one.control.store, instance.id)]
    assert actions == ["start", "unlock", "stop", "lock", "create"]


async def test_lock_of_an_admin_is_not_the_owners_to_undo_by_any_way(one: Plane) -> None:
    """An owner could not unlock what an admin had locked, but could lock it again: then the lock was the owner's own, and
    the owner's to undo."""
    instance = await one.created()
    lifecycle, owner = one.control.lifecycle, one.context()
    await lifecycle.lock(admin(one), instance, "under investigation")
    with pytest.raises(Locked):
        await lifecycle.unlock(owner, await one.fetch(instance.id))
    await lifecycle.lock(owner, await one.fetch(instance.id), None)
    locked = await one.fetch(instance.id)
    assert (locked.locked_by, locked.spec.locked_reason) == ("admin", "under investigation")
    with pytest.raises(Locked):
        await lifecycle.unlock(owner, locked)
    await lifecycle.unlock(admin(one), locked)
    assert (await one.fetch(instance.id)).locked_by is None


async def test_lock_during_an_operation_does_not_disturb_it(one: Plane) -> None:
    instance = await one.created()
    held = one.around_step = Held("set up ports")
    await one.control.lifecycle.reboot(one.context(), instance, hard=True)
    await held.wait()
    await asyncio.gather(*(one.control.lifecycle.lock(one.context(), instance, str(n)) for n in range(3)))
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.facts.fault, ended.locked_by) == (VmState.ACTIVE, None, "owner")


# --- reset of the state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [VmState.ACTIVE, VmState.ERROR])
async def test_reset_during_an_operation_ends_it_and_the_state_is_as_told(one: Plane, state: VmState) -> None:
    """A reset was noticed by the operation at its next write only: a stop went on waiting for its guest, ended it a minute
    after an admin had said that the server is active, and the state followed the guest."""
    instance = await one.created()
    held = one.around_step = Held("stop guest")
    await one.control.lifecycle.stop(one.context(), instance)
    await held.wait()
    await one.control.lifecycle.reset_state(admin(one), await one.fetch(instance.id), state)
    await one.settled()  # the step is not released: it is ended
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.task_state) == (state, None)
    reset, stop, _ = await operations_of_instance(one.control.store, instance.id)
    assert (reset.action, reset.result) == ("resetState", "Success")
    assert (stop.result, stop.message) == ("Error", "The operation was taken over by resetState.")
    assert await one.findings() == []
    await one.control.lifecycle.delete(one.context(), ended)
    await one.settled()
    await check_no_trace(one)


async def test_reset_during_a_build_then_delete_leaves_nothing(one: Plane) -> None:
    held = one.around_step = Held("start guest")
    instance = await one.create()
    await held.wait()
    await one.control.lifecycle.reset_state(admin(one), await one.fetch(instance.id), VmState.ERROR)
    # The delete comes while the build is still being unwound.
    await one.control.lifecycle.delete(one.context(), await one.fetch(instance.id))
    held.go.set()
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is VmState.DELETED
    await check_no_trace(one)


async def test_reset_during_a_delete_ends_it_and_another_delete_finishes(one: Plane) -> None:
    instance = await one.created()
    held = one.around_step = Held("release ports")
    await one.control.lifecycle.delete(one.context(), instance)
    await held.wait()
    await one.control.lifecycle.reset_state(admin(one), await one.fetch(instance.id), VmState.ERROR)
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.task_state) == (VmState.ERROR, None)
    await one.control.lifecycle.delete(one.context(), ended)
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is VmState.DELETED
    await check_no_trace(one)
    assert await usage_fetch(one.control.store, "demo") == {"instances": 0, "cores": 0, "ram": 0}


# --- quotas -------------------------------------------------------------------------------------------------------


async def test_fifty_creates_at_once_with_room_for_ten_make_exactly_ten(one: Plane) -> None:
    draft = await one.new()

    async def create() -> bool:
        try:
            await one.control.lifecycle.create(one.context(), [draft])
        except QuotaExceeded as refused:
            assert (refused.status, refused.resource, refused.used, refused.limit) == (403, "instances", 10, 10)
            return False
        return True

    assert sum(await asyncio.gather(*(create() for _ in range(50)))) == 10
    await one.settled()
    usage = await usage_fetch(one.control.store, "demo")
    assert (usage["instances"], usage["cores"]) == (10, 10 * draft.spec.flavor.vcpus)
    assert len(await one.guests()) == 10
    assert await one.findings() == []


async def test_creating_several_is_all_or_nothing(one: Plane) -> None:
    draft = await one.new()
    await one.control.lifecycle.create(one.context(), [draft] * 6)
    with pytest.raises(QuotaExceeded) as refused:
        await one.control.lifecycle.create(one.context(), [draft] * 5)
    assert (refused.value.requested, refused.value.used) == (5, 6)
    await one.settled()
    assert len(await one.guests()) == 6
    assert (await usage_fetch(one.control.store, "demo"))["instances"] == 6


async def test_usage_is_given_back_once_by_a_delete_whatever_became_of_the_build(one: Plane) -> None:
    good = await one.created("good")
    for host in one.hosts:
        faults(one, host).fail_next("ensure_running", HypervisorError(reason="no"))
    bad = await one.created("bad")
    assert (await usage_fetch(one.control.store, "demo"))["instances"] == 2, "a failed server counts until it is deleted"
    for instance in (good, bad, good, bad):
        try:
            await one.control.lifecycle.delete(one.context(), await one.fetch(instance.id))
        except InstarError:
            assert (await one.fetch(instance.id)).vm_state is VmState.DELETED
        await one.settled()
    assert await usage_fetch(one.control.store, "demo") == {"instances": 0, "cores": 0, "ram": 0}
    await check_no_trace(one)


async def test_usage_is_given_back_by_a_delete_that_took_over_a_build(one: Plane) -> None:
    held = one.around_step = Held("claim")
    instance = await one.create()
    await held.wait()
    await asyncio.gather(*(one.control.lifecycle.delete(one.context(), instance) for _ in range(3)))
    held.go.set()
    await one.settled()
    assert await usage_fetch(one.control.store, "demo") == {"instances": 0, "cores": 0, "ram": 0}
    await check_no_trace(one)


# --- what the audit finds -----------------------------------------------------------------------------------------


async def test_claim_on_a_host_that_the_instance_is_not_on_is_found_and_given_back(one: Plane) -> None:
    """A claim counted as owned when its instance existed, wherever that was: one that a slow conductor had made after its
    build was undone took room from its host until the server was deleted."""
    instance = await one.created()
    (other, *_) = [host for host in one.hosts if host != instance.host]
    await one.control.scheduler.claim("stray", instance.id, other, instance.spec.flavor)
    assert [(finding.kind, finding.subject) for finding in await one.findings()] == [(Kind.CLAIM, "stray")]
    await one.control.reconciler.settle_database()
    assert await one.findings() == []
    claims = await one.control.store.read("SELECT host FROM claims")
    assert [row["host"] for row in claims] == [instance.host]


async def test_what_cannot_be_repaired_keeps_nothing_else_from_it(one: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that a service did not let go ended each look: nothing behind it was repaired ever again."""
    instance = await one.created()
    (other, *_) = [host for host in one.hosts if host != instance.host]
    await one.control.scheduler.claim("stray", instance.id, other, instance.spec.flavor)
    await one.control.store.write(Statement("UPDATE project_usage SET cores = cores + 5", {}))

    async def refuses(claim_id: str) -> None:
        raise VolumeFailed(volume_id=claim_id, reason="as the test wants")

    with monkeypatch.context() as poison:
        poison.setattr(one.control.scheduler, "release", refuses)
        await one.control.reconciler.settle_database()
        assert [(finding.kind, finding.subject) for finding in await one.findings()] == [(Kind.CLAIM, "stray")]
    await one.control.reconciler.settle_database()
    assert await one.findings() == []


async def test_usage_and_totals_that_add_up_wrongly_are_found_and_repaired(one: Plane) -> None:
    await one.created()
    await one.control.store.write(
        Statement("UPDATE project_usage SET cores = cores + 5", {}),
        Statement("UPDATE hosts SET memory_claimed_mib = memory_claimed_mib + 1 WHERE name = 'sim-1'", {}),
    )
    kinds = {finding.kind for finding in await one.findings()}
    assert kinds == {Kind.USAGE, Kind.HOST_TOTALS}
    await one.control.reconciler.settle_database()
    assert await one.findings() == []
