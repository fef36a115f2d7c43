"""What guests and hosts do by themselves: the record follows, never while an operation is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from instar.engine.hosts import HostClient
from instar.hypervisor.simulated.faults import HostFaults
from instar.lifecycle import guest_events
from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from instar.store.contract import Statement
from instar.store.operations import operations_of_instance
from tests.lifecycle.harness import SETTINGS, Plane, plane, prepared
from tests.lifecycle.watching import Held, faults, until, until_state

_F, _V, _P = HostFaults, VmState, PowerState


async def actions_of(one: Plane, instance_id: str) -> list[str]:
    return [operation.action for operation in await operations_of_instance(one.control.store, instance_id)]


@pytest.mark.parametrize(
    ("happens", "vm_state", "power"),
    [
        (_F.guest_powers_off, _V.STOPPED, _P.SHUTDOWN),
        (_F.guest_dies, _V.STOPPED, None),
        (_F.guest_is_destroyed, _V.STOPPED, _P.SHUTDOWN),
        (_F.guest_vanishes, _V.STOPPED, _P.NOSTATE),
        (_F.guest_pauses, _V.PAUSED, _P.PAUSED),
    ],
)
async def test_guest_that_changes_by_itself_is_followed_with_a_record(
    one: Plane, happens: Callable[[HostFaults, str], None], vm_state: VmState, power: PowerState | None
) -> None:
    instance = await one.created()
    happens(faults(one, instance.host), instance.id)
    ended = await until_state(one, instance.id, vm_state)
    assert power is None or ended.power_state is power
    record = await one.last_operation(instance.id)
    assert (record.action, record.result, record.user_id) == ("power-sync", "Success", "")
    assert record.message == f"The guest changed by itself: active is now {vm_state.value}"
    assert await one.findings() == []
    # What happened by itself is no dead end.
    await one.control.lifecycle.reboot(one.context(), ended, hard=True)
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is _V.ACTIVE


async def test_guest_that_was_paused_and_goes_on_is_active_again(one: Plane) -> None:
    instance = await one.created()
    faults(one, instance.host).guest_pauses(instance.id)
    await until_state(one, instance.id, _V.PAUSED)
    faults(one, instance.host).guest_resumes(instance.id)
    ended = await until_state(one, instance.id, _V.ACTIVE)
    assert ended.power_state is _P.RUNNING
    assert (await actions_of(one, instance.id))[:2] == ["power-sync", "power-sync"]


async def test_guest_that_is_started_behind_our_back_is_active(one: Plane) -> None:
    instance = await one.created()
    await one.control.lifecycle.stop(one.context(), instance)
    await one.settled()
    machine = faults(one, instance.host)._machine
    machine.start(machine.guests[instance.id])
    assert (await until_state(one, instance.id, _V.ACTIVE)).power_state is _P.RUNNING


async def test_nothing_is_synced_while_an_operation_is_in_flight(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_events, "BUSY_RETRY_S", 0.01)
    instance = await one.created()
    held = one.around_step = Held("set up ports")
    await one.control.lifecycle.reboot(one.context(), instance, hard=True)
    await held.wait()
    before = await one.fetch(instance.id)
    faults(one, instance.host).guest_powers_off(instance.id)
    await one.control.reconciler.reconcile_host(instance.host or "")
    await asyncio.sleep(0.1)
    assert await one.fetch(instance.id) == before
    held.go.set()
    await one.settled()
    ended = await until_state(one, instance.id, _V.ACTIVE)
    assert ended.power_state is _P.RUNNING
    assert await actions_of(one, instance.id) == ["reboot", "create"]


async def test_change_during_an_operation_that_failed_is_found_after_it(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_events, "BUSY_RETRY_S", 0.01)
    instance = await one.created()
    faults(one, instance.host).hang_next("ensure_stopped")
    await one.control.lifecycle.stop(one.context(), instance)

    async def stopping() -> bool:
        return bool(await one.journal(instance.id)) and (await one.last_operation(instance.id)).action == "stop"

    await until("the stop is on its way", stopping)
    faults(one, instance.host).fail_next("ensure_stopped", after_work=True)
    faults(one, instance.host).guest_powers_off(instance.id)
    faults(one, instance.host).release()
    await one.settled()
    await until_state(one, instance.id, _V.STOPPED)


async def test_storm_of_events_asks_the_host_a_few_times_and_ends_in_what_is(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event was looked into on its own, and while an operation was in flight each came back every second: a guest
    that flapped during a long operation made a heap that had no bound."""
    instance = await one.created()
    asked = 0
    observe_of = HostClient.observe_of

    async def counted(self: HostClient, host: str, instance_id: str):  # type: ignore[no-untyped-def]
        nonlocal asked
        asked += 1
        return await observe_of(self, host, instance_id)

    monkeypatch.setattr(HostClient, "observe_of", counted)
    held = one.around_step = Held("set up ports")
    await one.control.lifecycle.reboot(one.context(), instance, hard=True)
    await held.wait()
    trouble = faults(one, instance.host)
    for _ in range(500):
        trouble.guest_pauses(instance.id)
        trouble.guest_resumes(instance.id)
    await asyncio.sleep(0.05)
    assert one.control.reconciler._events.waiting <= 1
    held.go.set()
    await one.settled()
    for _ in range(500):
        trouble.guest_pauses(instance.id)
        trouble.guest_resumes(instance.id)
    trouble.guest_powers_off(instance.id)
    await until_state(one, instance.id, _V.STOPPED)
    assert asked < 100


async def test_events_that_were_lost_are_found_by_the_timer(tmp_path: Path, image_file: Path) -> None:
    host = msgspec.structs.replace(SETTINGS.host, power_sync_s=0.1)
    async with prepared(tmp_path, image_file, msgspec.structs.replace(SETTINGS, host=host)) as one:
        instance = await one.created()
        machine = faults(one, instance.host)._machine
        tell, machine.on_event = machine.on_event, None
        faults(one, instance.host).guest_powers_off(instance.id)
        await until_state(one, instance.id, _V.STOPPED)
        machine.on_event = tell


async def test_what_happened_while_the_control_plane_was_away_is_found_at_the_start(
    tmp_path: Path, image_file: Path
) -> None:
    async with prepared(tmp_path, image_file) as one:
        instance = await one.created()
        faults(one, instance.host)._machine.on_event = None
        faults(one, instance.host).guest_powers_off(instance.id)
    async with plane(tmp_path) as one:
        await until_state(one, instance.id, _V.STOPPED)


async def guests_of_all_kinds(one: Plane) -> tuple[Instance, Instance]:
    running, stopped = await one.created("running"), await one.created("stopped")
    await one.control.lifecycle.stop(one.context(), stopped)
    await one.settled()
    return running, await one.fetch(stopped.id)


async def test_guests_that_should_run_are_started_after_a_restart_of_their_host_with_their_disks(
    tmp_path: Path, image_file: Path
) -> None:
    async with prepared(tmp_path, image_file, boot_id="boot-1") as one:
        running, stopped = await guests_of_all_kinds(one)
        boots = faults(one, running.host).boots(running.id)
        for host in one.hosts:
            faults(one, host).host_restarts()
    async with plane(tmp_path, boot_id="boot-2") as one:
        machine = faults(one, running.host)._machine

        async def resumed() -> bool:
            return machine.state_of(running.id).power_state is _P.RUNNING

        await until("the guest runs again", resumed)
        await one.settled()
        ended = await until_state(one, running.id, _V.ACTIVE)
        assert ended.power_state is _P.RUNNING
        assert await actions_of(one, running.id) == ["reboot", "create"]
        assert faults(one, running.host).boots(running.id) == boots + 1, "its disk is another one"
        await asyncio.sleep(0.1)
        assert (await one.fetch(stopped.id)).vm_state is _V.STOPPED
        assert await actions_of(one, stopped.id) == ["stop", "create"]
        assert await one.findings() == []
    async with plane(tmp_path, boot_id="boot-2") as one:
        await asyncio.sleep(0.1)
        await one.settled()
        assert await actions_of(one, running.id) == ["reboot", "create"], "rebooted again without a restart of its host"


async def test_guests_are_started_when_their_host_answers_before_it_reports(tmp_path: Path, image_file: Path) -> None:
    """A host that came back was looked at (it had leftovers of an evacuation) between its first answer and its first
    report: the record still had the start of the machine before, and its guests were taken for stopped."""
    async with prepared(tmp_path, image_file, boot_id="boot-1") as one:
        running, _ = await guests_of_all_kinds(one)
        faults(one, running.host).host_restarts()
        one.boot_id = "boot-2"
        await one.control.reconciler.reconcile_host(running.host)
        await one.settled()
        assert (await until_state(one, running.id, _V.ACTIVE)).power_state is _P.RUNNING
        assert await actions_of(one, running.id) == ["reboot", "create"]


async def test_deleted_guest_that_cannot_be_ended_keeps_no_other_from_being_seen_to(one: Plane) -> None:
    """Its QEMU hung on storage that was gone: each look at the host ended there, and after a restart of the host the guests
    behind it in the list were not started."""
    deleted, other = [await one.created(f"guest-{number}", requested_host=one.hosts[0]) for number in range(2)]
    host = one.hosts[0]
    gone = Statement("UPDATE instances SET vm_state = 'soft-delete' WHERE id = :id", {"id": deleted.id})
    await one.control.store.write(gone)
    assert (await one.fetch(deleted.id)).vm_state is _V.SOFT_DELETED
    one.control.reconciler._events.put = lambda host, instance_id: None  # type: ignore[method-assign]
    faults(one, host).guest_powers_off(other.id)
    faults(one, host).fail_next("ensure_stopped")
    await one.control.reconciler.reconcile_host(host)
    assert (await one.fetch(other.id)).vm_state is _V.STOPPED
    assert (await one.fetch(deleted.id)).vm_state is _V.SOFT_DELETED


async def test_guest_that_is_off_without_a_restart_of_its_host_is_stopped(tmp_path: Path, image_file: Path) -> None:
    async with prepared(tmp_path, image_file, boot_id="boot-1") as one:
        running, _ = await guests_of_all_kinds(one)
        for host in one.hosts:
            faults(one, host).host_restarts()
    async with plane(tmp_path, boot_id="boot-1") as one:
        ended = await until_state(one, running.id, _V.STOPPED)
        assert ended.power_state is _P.SHUTDOWN


async def test_restart_of_the_host_during_an_operation_does_not_stop_it(tmp_path: Path, image_file: Path) -> None:
    async with prepared(tmp_path, image_file, boot_id="boot-1") as one:
        instance = await one.created()
        held = one.around_step = Held("restart guest")
        await one.control.lifecycle.reboot(one.context(), instance, hard=True)
        await held.wait()
        faults(one, instance.host).host_restarts()
    async with plane(tmp_path, boot_id="boot-2") as one:
        await one.settled()
        ended = await until_state(one, instance.id, _V.ACTIVE)
        assert (ended.facts.fault, ended.power_state) == (None, _P.RUNNING)
        assert await one.findings() == []
