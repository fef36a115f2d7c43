"""Operations that come while another one is in flight: deletes at any moment, hard reboots over hanging soft ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from instar.config import LifecycleSettings, Settings
from instar.engine.hosts import HostClient
from instar.errors import HypervisorError, NotFound, WrongState
from instar.lifecycle import reconcile
from instar.model.instance import Instance
from instar.model.states import VmState
from instar.store.operations import operations_of_instance
from tests.lifecycle.harness import SETTINGS, Plane, prepared
from tests.lifecycle.scenarios import SCENARIOS, victim
from tests.lifecycle.watching import Held, check_no_trace, faults, until
from tests.patience import PATIENCE_S


async def steps_of(directory: Path, image_file: Path, name: str, *, failing: str = "") -> list[str]:
    """The steps of a run, undos included, in which the step `failing` fails."""

    async def fail(step: str, call: Callable[[], Awaitable[object]]) -> object:
        if step == failing:
            raise HypervisorError(reason="as the test wants")
        return await call()

    async with prepared(directory, image_file) as one:
        instance = await victim(one, SCENARIOS[name])
        one.around_step = fail
        instance = await SCENARIOS[name].act(one, instance)
        await one.settled()
        return [step.name for step in await one.journal(instance.id)]


async def delete_at(one: Plane, name: str, held: Callable[[str, Callable[[], Awaitable[object]]], Awaitable[object]],
                    reached: asyncio.Event, go: asyncio.Event) -> None:  # fmt: skip
    """Begin the operation, delete when it has reached the step, and see that nothing is left."""
    instance = await victim(one, SCENARIOS[name])
    one.around_step = held
    instance = await SCENARIOS[name].act(one, instance)
    async with asyncio.timeout(PATIENCE_S):
        await reached.wait()
    await one.control.lifecycle.delete(one.context(), await one.fetch(instance.id))
    go.set()
    await one.settled()
    one.around_step = None
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.task_state) == (VmState.DELETED, None), ended.facts.fault
    assert (await one.last_operation(instance.id)).result == "Success"
    if (after := SCENARIOS[name].after) is not None:
        await after(one)
    await check_no_trace(one)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if not name.startswith("delete")])
async def test_delete_during_every_step_leaves_nothing(tmp_path: Path, image_file: Path, name: str) -> None:
    steps = await steps_of(tmp_path / "clean", image_file, name)
    async with prepared(tmp_path / "cloud", image_file) as one:
        for step in steps:
            held = Held(step)
            # Not released: the delete must end the step by itself.
            await delete_at(one, name, held, held.reached, asyncio.Event())


async def test_delete_while_a_failed_build_is_being_undone_leaves_nothing(tmp_path: Path, image_file: Path) -> None:
    steps = await steps_of(tmp_path / "clean", image_file, "create", failing="start guest")
    undos = [step for step in steps if step.startswith("undo ")]
    assert len(undos) >= 4, "the guest, its ports, its disk, its addresses and its claim are given back"
    async with prepared(tmp_path / "cloud", image_file) as one:
        for undo in undos:
            held = Held(undo)

            async def fail_then_hold(
                step: str, call: Callable[[], Awaitable[object]], held: Held = held
            ) -> object:
                if step == "start guest":
                    raise HypervisorError(reason="as the test wants")
                return await held(step, call)

            # An undo is never cut short: the delete waits for it.
            await delete_at(one, "create", fail_then_hold, held.reached, held.go)


async def test_two_deletes_at_once_are_one_delete(one: Plane) -> None:
    instance = await one.created()
    held = one.around_step = Held("remove guest")
    lifecycle, context = one.control.lifecycle, one.context()
    await asyncio.gather(*(lifecycle.delete(context, instance) for _ in range(5)))
    await held.wait()
    await lifecycle.delete(context, await one.fetch(instance.id))
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.facts.fault) == (VmState.DELETED, None)
    actions = [operation.action for operation in await operations_of_instance(one.control.store, instance.id)]
    assert actions == ["delete", "create"]
    await check_no_trace(one)
    with pytest.raises((WrongState, NotFound)):
        await lifecycle.delete(context, ended)


def slow_guests() -> Settings:
    """Settings under which a guest has so much time that a test which waits for it fails."""
    return msgspec.structs.replace(
        SETTINGS, lifecycle=LifecycleSettings(wait_soft_reboot_seconds=270, shutdown_grace_s=270)
    )


async def with_deaf_guest(one: Plane) -> Instance:
    instance = await one.created()
    faults(one, instance.host).ignores_acpi = True
    return instance


async def until_waiting(one: Plane, instance_id: str, step: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while step not in [done.name for done in await one.journal(instance_id)]:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)


async def test_hard_reboot_takes_over_a_soft_one_whose_guest_does_not_answer(tmp_path: Path, image_file: Path) -> None:
    """Commands for one instance run one after another on its host, so a hard reboot waited until the soft one had given
    up on the guest: two minutes, or for ever when its own deadline was shorter. What waits now gives way to what is
    newer."""
    async with prepared(tmp_path, image_file, slow_guests()) as one:
        instance = await with_deaf_guest(one)
        before = await one.world.host(instance.host or "").observe(instance.id)
        await one.control.lifecycle.reboot(one.context(), instance, hard=False)
        await until_waiting(one, instance.id, "shut down guest")
        started = time.monotonic()
        await one.control.lifecycle.reboot(one.context(), await one.fetch(instance.id), hard=True)
        await one.settled()
        assert time.monotonic() - started < PATIENCE_S
        ended = await one.fetch(instance.id)
        assert (ended.vm_state, ended.task_state, ended.facts.fault) == (VmState.ACTIVE, None, None)
        after = await one.world.host(instance.host or "").observe(instance.id)
        assert after.domain_id not in (None, before.domain_id)
        hard, soft, *_ = await operations_of_instance(one.control.store, instance.id)
        assert (hard.result, soft.result) == ("Success", "Error")
        assert soft.message == "The operation was taken over by reboot."


@pytest.mark.parametrize("name", ["soft reboot", "stop"])
async def test_delete_is_not_kept_waiting_by_a_guest_that_does_not_shut_down(
    tmp_path: Path, image_file: Path, name: str
) -> None:
    async with prepared(tmp_path, image_file, slow_guests()) as one:
        instance = await with_deaf_guest(one)
        if name == "stop":
            await one.control.lifecycle.stop(one.context(), instance)
        else:
            await one.control.lifecycle.reboot(one.context(), instance, hard=False)
        await until_waiting(one, instance.id, "stop guest" if name == "stop" else "shut down guest")
        started = time.monotonic()
        await one.control.lifecycle.delete(one.context(), await one.fetch(instance.id))
        await one.settled()
        assert time.monotonic() - started < PATIENCE_S
        assert (await one.fetch(instance.id)).vm_state is VmState.DELETED
        await check_no_trace(one)


async def test_console_can_be_read_while_a_soft_reboot_waits_for_the_guest(tmp_path: Path, image_file: Path) -> None:
    """Reading a console waited for the instance's turn on its host, and so failed just when one wants to see it."""
    async with prepared(tmp_path, image_file, slow_guests()) as one:
        instance = await with_deaf_guest(one)
        await one.control.lifecycle.reboot(one.context(), instance, hard=False)
        await until_waiting(one, instance.id, "shut down guest")
        async with asyncio.timeout(PATIENCE_S):
            text = await one.control.lifecycle.guests.console_output(instance, None)
        assert "INSTAR-BOOT count=1" in text


@pytest.mark.parametrize("name", ["start", "stop", "reboot-soft", "create"])
async def test_second_operation_is_refused_while_the_first_is_in_flight(one: Plane, name: str) -> None:
    scenario = SCENARIOS[name]
    instance = await victim(one, scenario)
    first = {"start": "read ports", "stop": "stop guest", "reboot-soft": "note domain id", "create": "claim"}[name]
    held = one.around_step = Held(first)
    instance = await scenario.act(one, instance)
    await held.wait()
    now = await one.fetch(instance.id)
    assert now.task_state is not None
    lifecycle, context = one.control.lifecycle, one.context()
    for act in (lifecycle.start, lifecycle.stop):
        with pytest.raises(WrongState, match=f"Cannot 'st(art|op)' instance {instance.id} while it is in "):
            await act(context, now)
    with pytest.raises(WrongState, match="Cannot 'reboot' instance"):
        await lifecycle.reboot(context, now, hard=False)
    # Decided by the database, not by what the caller has seen a while ago.
    if instance.vm_state is VmState.ACTIVE:
        with pytest.raises(WrongState, match="changed meanwhile"):
            await lifecycle.stop(context, instance)
    held.go.set()
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is scenario.ends


async def test_packet_filters_are_not_brought_back_to_the_host_of_a_server_that_is_being_deleted(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters are refreshed beside operations. A refresh that had read of its instance during a delete carried the delete's
    own epoch: coming after the guest was removed, it set up the ports again, and they stayed on the host for ever."""
    monkeypatch.setattr(reconcile, "BUSY_RETRY_S", 0.05)
    instance = await one.created()
    read, go_on = asyncio.Event(), asyncio.Event()
    ports_of_instances = one.control.networks.ports_of_instances

    async def slowly(instance_ids):  # type: ignore[no-untyped-def]
        found = await ports_of_instances(instance_ids)
        read.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(one.control.networks, "ports_of_instances", slowly)
    held = one.around_step = Held("remove guest")
    await one.control.lifecycle.delete(one.context(), instance)
    await held.wait()
    during = asyncio.create_task(one.control.ports.refresh({instance.id}))
    await read.wait()
    held.go.set()
    await one.settled()
    go_on.set()
    await during
    await check_no_trace(one)


async def test_packet_filters_of_a_busy_server_are_refreshed_when_it_is_idle(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = await one.created()
    set_up: list[str] = []
    ensure_ports = HostClient.ensure_ports

    async def counted(self: HostClient, host: str, ports):  # type: ignore[no-untyped-def]
        set_up.append(host)
        await ensure_ports(self, host, ports)

    monkeypatch.setattr(HostClient, "ensure_ports", counted)
    held = one.around_step = Held("stop guest")
    await one.control.lifecycle.stop(one.context(), instance)
    await held.wait()
    set_up.clear()  # what its creation still had to tell, while it was idle
    await one.control.ports.refresh({instance.id})
    assert set_up == []
    held.go.set()

    async def refreshed() -> bool:
        return set_up == [instance.host]

    await until("the ports are set up anew", refreshed)
