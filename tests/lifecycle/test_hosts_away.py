"""Hosts whose hypervisor is away: operations say so, go elsewhere or wait for nobody, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from instar.engine.hosts import HostClient
from instar.errors import HostUnreachable, HypervisorError
from instar.lifecycle import port_refresh
from instar.lifecycle.shelve import UnshelveArguments
from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from instar.store.hosts import host_set_forced_down
from tests.lifecycle.harness import SETTINGS, Plane, prepared
from tests.lifecycle.losing import Network, look_again
from tests.lifecycle.scenarios import shelved_in_place
from tests.lifecycle.watching import Held, check_no_trace, faults, until, until_state
from tests.patience import PATIENCE_S


async def until_known(one: Plane, host: str | None, *, ok: bool) -> None:
    async def known() -> bool:
        view = one.control.hosts.get(host or "")
        return view is not None and view.hypervisor_ok is ok

    await until(f"the control plane knows of {host}", known)


@pytest.mark.parametrize("action", ["stop", "delete"])
async def test_operation_gives_up_at_once_on_a_host_that_an_admin_says_is_down(
    tmp_path: Path, image_file: Path, action: str
) -> None:
    """Nobody waits for a host of which somebody has seen that it is off, however patient the cloud is with silent ones."""
    patient = msgspec.structs.replace(SETTINGS.host, lost_after_s=600.0)
    settings = msgspec.structs.replace(
        SETTINGS, host=patient, engine=msgspec.structs.replace(SETTINGS.engine, step_deadline_s=600)
    )
    async with prepared(tmp_path, image_file, settings) as one:
        instance = await one.created()
        method = "ensure_stopped" if action == "stop" else "ensure_absent"
        faults(one, instance.host).hang_next(method)
        await getattr(one.control.lifecycle, action)(one.context(), instance)

        async def hangs() -> bool:
            return not faults(one, instance.host)._planned[method]  # type: ignore[index]

        await until("the host was told", hangs)
        await one.control.store.write(host_set_forced_down(instance.host or "", True))
        await one.settled()
        ended = await one.fetch(instance.id)
        assert (await one.last_operation(instance.id)).result == ("Error" if action == "stop" else "Success")
        assert ended.vm_state is (VmState.ACTIVE if action == "stop" else VmState.DELETED)
        faults(one, instance.host).clear()
        await one.control.store.write(host_set_forced_down(instance.host or "", False))
        await one.control.hosts.refresh()
        await look_again(one)
        if action == "delete":
            await check_no_trace(one)


async def test_create_goes_elsewhere_while_a_hypervisor_is_away(one: Plane) -> None:
    for host in one.hosts[:2]:
        faults(one, host).down = True
    # At once, before any report says so: a host that does not answer costs an attempt; and afterwards, when it is known.
    assert (await one.created("first")).host == one.hosts[2]
    for host in one.hosts[:2]:
        await until_known(one, host, ok=False)
    second = await one.created("second")
    assert second.host == one.hosts[2]
    assert "claim (2)" not in [step.name for step in await one.journal(second.id)]


async def test_create_fails_with_a_reason_when_every_hypervisor_is_away(one: Plane) -> None:
    network = Network(one)
    network.unheard.update(one.hosts)  # so that nobody knows yet when the first one is built
    for host in one.hosts:
        faults(one, host).down = True
    first = await one.created("first")
    network.unheard.clear()
    for host in one.hosts:
        await until_known(one, host, ok=False)
    second = await one.created("second")
    for instance in (first, second):
        assert (instance.vm_state, instance.host) == (VmState.ERROR, None)
        assert instance.facts.fault is not None
    assert first.facts.fault is not None
    assert "The hypervisor of the host is not available." in first.facts.fault.message
    assert "The hypervisor of host sim-" in first.facts.fault.details
    assert second.facts.fault is not None
    assert second.facts.fault.message == "No valid host was found. enabled: 3 hosts refused."
    assert "sim-1: enabled: its hypervisor is not available" in second.facts.fault.details.splitlines()
    for host in one.hosts:
        faults(one, host).clear()
    for host in one.hosts:
        await until_known(one, host, ok=True)
    await check_no_trace(one)


@pytest.mark.parametrize("action", ["soft reboot", "hard reboot", "stop", "start"])
async def test_operation_on_a_host_that_is_away_fails_clearly_and_leaves_the_state(one: Plane, action: str) -> None:
    instance = await one.created()
    lifecycle, context = one.control.lifecycle, one.context()
    if action == "start":
        await lifecycle.stop(context, instance)
        await one.settled()
        instance = await one.fetch(instance.id)
    faults(one, instance.host).down = True
    acts = {
        "soft reboot": lambda: lifecycle.reboot(context, instance, hard=False),
        "hard reboot": lambda: lifecycle.reboot(context, instance, hard=True),
        "stop": lambda: lifecycle.stop(context, instance),
        "start": lambda: lifecycle.start(context, instance),
    }
    await acts[action]()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.task_state, ended.power_state) == (instance.vm_state, None, instance.power_state)
    assert ended.facts.fault is not None
    assert ended.facts.fault.message == "The hypervisor of the host is not available."
    assert ended.facts.fault.details == f"The hypervisor of host {instance.host} is not available."
    operation = await one.last_operation(instance.id)
    assert (operation.result, operation.message) == ("Error", ended.facts.fault.details)
    faults(one, instance.host).down = False
    instance = ended
    await acts[action]()
    await one.settled()
    assert (await one.fetch(instance.id)).facts.fault is None


async def test_delete_does_not_wait_for_a_host_that_is_away_and_its_leftovers_go_when_it_returns(one: Plane) -> None:
    instance = await one.created()
    faults(one, instance.host).down = True
    await until_known(one, instance.host, ok=False)
    await one.control.lifecycle.delete(one.context(), instance)
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is VmState.DELETED
    assert faults(one, instance.host)._machine.state_of(instance.id).power_state is PowerState.RUNNING
    faults(one, instance.host).down = False

    async def gone() -> bool:
        return await one.guests() == {}

    await until("the leftovers are removed", gone)
    await check_no_trace(one)


async def test_host_that_goes_away_during_a_build_keeps_nothing_of_it_when_it_returns(one: Plane) -> None:
    held = one.around_step = Held("start guest")
    instance = await one.create()
    await held.wait()
    first = (await one.fetch(instance.id)).host
    faults(one, first).down = True
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.facts.fault) == (VmState.ACTIVE, None)
    assert ended.host not in (None, first)
    await until_known(one, first, ok=False)
    faults(one, first).down = False

    async def cleaned() -> bool:
        census = await one.world.host(first or "").census()
        return (census.guests, census.instance_dirs) == ({}, ())

    await until("the first host is clean", cleaned)
    assert await one.guests() == {instance.id: ended.host}
    assert await one.findings() == []


async def test_guest_that_stopped_while_its_host_was_away_is_found_when_it_returns(one: Plane) -> None:
    instance = await one.created()
    faults(one, instance.host).down = True
    await until_known(one, instance.host, ok=False)
    faults(one, instance.host).guest_powers_off(instance.id)
    await asyncio.sleep(0.05)
    assert (await one.fetch(instance.id)).vm_state is VmState.ACTIVE
    faults(one, instance.host).down = False
    await until_state(one, instance.id, VmState.STOPPED)


async def failing_hard_reboot(one: Plane, instance: Instance, *, after_work: bool) -> Instance:
    faults(one, instance.host).fail_next(
        "ensure_restarted", HypervisorError(reason="no"), after_work=after_work
    )
    await one.control.lifecycle.reboot(one.context(), instance, hard=True)
    await one.settled()
    return await one.fetch(instance.id)


async def test_reboot_that_failed_although_the_guest_runs_leaves_it_active_with_a_fault(one: Plane) -> None:
    ended = await failing_hard_reboot(one, await one.created(), after_work=True)
    assert ended.vm_state is VmState.ACTIVE
    assert ended.facts.fault is not None


async def test_reboot_that_failed_and_left_the_guest_off_is_an_error_from_which_a_reboot_leads_out(one: Plane) -> None:
    instance = await one.created()
    held = one.around_step = Held("restart guest")
    faults(one, instance.host).fail_next("ensure_restarted", HypervisorError(reason="no"))
    await one.control.lifecycle.reboot(one.context(), instance, hard=True)
    await held.wait()
    faults(one, instance.host).guest_is_destroyed(instance.id)
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert ended.vm_state is VmState.ERROR
    await one.control.lifecycle.reboot(one.context(), ended, hard=True)
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is VmState.ACTIVE


async def test_guests_of_silent_hosts_keep_no_packet_filters_waiting(one: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them took a turn for twenty seconds, of sixteen turns in all: with a rack without power a rule that was taken
    back stood for many minutes on the hosts that were there."""
    instances = [await one.created(f"guest-{number}") for number in range(2)]
    silent, other = instances
    told: list[str] = []

    async def ensure_ports(self: HostClient, host: str, ports: object) -> None:
        told.append(self._instance_id)

    monkeypatch.setattr(HostClient, "ensure_ports", ensure_ports)
    places = {silent.id: ("silent", 1, False), other.id: (str(other.host), 1, False)}
    monkeypatch.setattr(port_refresh, "instance_places", lambda store, ids: given(places))
    monkeypatch.setattr(one.control.cloud.scheduler, "is_silent", lambda host: host == "silent")
    late = await port_refresh.PortRefresh(one.control.cloud).refresh_or_late({silent.id, other.id})
    assert (told, late) == ([other.id], {silent.id})


async def test_image_that_a_host_fetches_ahead_is_given_up_when_the_host_falls_silent(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few hosts that died while they fetched held all who fetch ahead for an hour."""
    silent: set[str] = set()
    monkeypatch.setattr(one.control.cloud.scheduler, "fell_silent", lambda host, waited_s: host in silent)
    host, image = one.hosts[0], await one.image()
    faults(one, host).hang_next("ensure_image")
    prefetch = one.control.lifecycle.prefetch
    prefetch.ask([image.id], [host])

    async def hangs() -> bool:
        return not faults(one, host)._planned["ensure_image"]  # type: ignore[index]

    await until("the host was told", hangs)
    silent.add(host)
    async with asyncio.timeout(PATIENCE_S):
        await prefetch.wait_until_done()
    faults(one, host).clear()


async def given(value: object) -> object:
    return value


async def test_hosts_that_are_silent_are_not_asked_again_and_again(
    one: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at one waited twenty seconds for an answer: a rack without power took all who look, for ever, and hosts
    that came back were let in minutes later."""
    reconciler, scheduler = one.control.reconciler, one.control.cloud.scheduler
    host = one.hosts[0]
    looked: list[str] = []

    async def look(host: str) -> None:
        looked.append(host)

    monkeypatch.setattr(reconciler, "reconcile_host", look)
    monkeypatch.setattr(scheduler, "is_silent", lambda name: name == host)
    await reconciler._look_at(host)
    await reconciler._look_at(one.hosts[1])
    assert looked == [one.hosts[1]]
    monkeypatch.setattr(scheduler, "is_silent", lambda name: False)

    async def looked_at() -> bool:
        return host in looked

    await until("it is looked at when it is heard again", looked_at)


async def test_shelved_guest_whose_failed_start_could_not_be_taken_back_is_ended_when_its_host_is_seen(one: Plane) -> None:
    instance = await shelved_in_place(one, await one.created())
    host = instance.host or ""
    started = asyncio.Event()

    async def unheard(name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name == "undo start guest":
            raise HostUnreachable(host=host)
        answer = await call()
        if name == "start guest":
            started.set()
            raise HostUnreachable(host=host)
        return answer

    one.around_step = unheard
    await one.control.lifecycle.unshelve(one.context(), await one.fetch(instance.id), UnshelveArguments())
    await one.settled()
    one.around_step = None
    assert started.is_set()

    async def is_off() -> bool:
        return (await one.world.host(host).observe(instance.id)).power_state is PowerState.SHUTDOWN

    await until("the guest is off", is_off)
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.task_state) == (VmState.SHELVED, None)
    await one.control.lifecycle.unshelve(one.context(), ended, UnshelveArguments())
    await until_state(one, instance.id, VmState.ACTIVE)
