"""A host that is cut off with a running guest, which is evacuated; then it comes back, with commands that waited for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from instar.bus.contract import Message
from instar.errors import BadRequest, HostNotReady
from instar.lifecycle.evacuate import EvacuateArguments
from instar.model.commands import HOST_QUEUE, EnsureRunning
from instar.model.guest import GuestDefinition
from instar.model.states import VmState
from tests.lifecycle.apart import Apart, apart_plane
from tests.lifecycle.watching import check_no_trace


@pytest.fixture
async def apart(tmp_path: Path, image_file: Path) -> AsyncIterator[Apart]:
    async with apart_plane(tmp_path / "cloud", image_file) as one:
        yield one


async def test_host_that_was_cut_off_loses_its_evacuated_guest_before_it_does_anything_else(apart: Apart) -> None:
    instance = await apart.created()
    host = instance.host or ""
    agent, bus, noting = apart.agents[host], apart.buses[host], apart.noting[host]
    with pytest.raises(BadRequest, match="still in use"):
        await apart.evacuated(instance)
    bus.whole.clear()
    # A reboot is told to the host and waits there, until the cloud sees that the host is gone.
    await apart.control.lifecycle.reboot(apart.context(), instance, hard=True)
    await apart.settled()
    assert (await apart.last_operation(instance.id)).result == "Error"
    await apart.until_up(host, up=False)
    assert agent._admission.is_shut(host), "it could be replaced before it had shut itself"
    ended = await apart.evacuated(await apart.fetch(instance.id))
    assert (ended.vm_state, ended.facts.fault) == (VmState.ACTIVE, None)
    assert ended.host not in (None, host)
    assert sorted(apart.runs_on(instance.id)) == sorted([host, str(ended.host)]), "nobody could end the old one"

    noting.told.clear()
    bus.whole.set()
    await apart.until_up(host, up=True)
    assert apart.runs_on(instance.id) == [ended.host]
    assert noting.told[0] == "ensure_absent"
    assert "ensure_restarted" not in noting.told, "what had waited in its queue was done"
    assert await apart.findings() == []

    # It is a host as any other again.
    later = await apart.created("later", requested_host=host)
    assert (later.host, later.facts.fault) == (host, None)
    for one in (ended, later):
        await apart.control.lifecycle.delete(apart.context(), one)
    await apart.settled()
    await check_no_trace(apart)


async def test_command_from_before_the_evacuation_that_comes_after_the_return_is_refused(apart: Apart) -> None:
    """It waited somewhere on its way for longer than its host was shut: neither its session nor its epoch is of now."""
    instance = await apart.created()
    host = instance.host or ""
    session, guest = apart.control.hosts.session_of(host), GuestDefinition(instance.id, "guest", 1, 128, ())
    old = EnsureRunning(guest=guest, instance_id=instance.id, epoch=instance.epoch, session=session)
    apart.buses[host].whole.clear()
    await apart.until_up(host, up=False)
    ended = await apart.evacuated(instance)
    apart.buses[host].whole.set()
    await apart.until_up(host, up=True)
    for stale, reason in ((old, "HostNotReady"), (msgspec.structs.replace(old, session=0), "StaleEpoch")):
        message = Message("EnsureRunning", msgspec.msgpack.encode(stale), 2.0)
        reply = await apart.control.bus.call(HOST_QUEUE + host, message)
        assert reply.error is not None
        assert reply.error[0] == reason
    assert apart.runs_on(instance.id) == [ended.host]


async def test_host_that_returns_while_its_guest_is_evacuated_gives_it_up_at_once(apart: Apart) -> None:
    instance = await apart.created()
    host = instance.host or ""
    apart.buses[host].whole.clear()
    await apart.until_up(host, up=False)
    going, reached = asyncio.Event(), asyncio.Event()

    async def hold(name: str, call: Any) -> object:
        if name == "start guest":
            reached.set()
            await going.wait()
        return await call()

    apart.around_step = hold
    await apart.control.lifecycle.evacuate(apart.context(roles=("admin",)), instance, EvacuateArguments())
    await reached.wait()
    apart.buses[host].whole.set()
    await apart.until_up(host, up=True)
    assert apart.runs_on(instance.id) == []
    going.set()
    await apart.settled()
    ended = await apart.fetch(instance.id)
    assert apart.runs_on(instance.id) == [ended.host]
    assert ended.host != host


async def test_look_at_a_host_that_answers_before_it_has_reported_is_over_at_once(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for the host to be admitted, twenty seconds for each thing left there, and nobody else could admit it."""
    instance = await apart.created()
    host = instance.host or ""
    apart.buses[host].whole.clear()
    await apart.until_up(host, up=False)
    ended = await apart.evacuated(instance)
    reconciler = apart.control.reconciler
    with monkeypatch.context() as deaf:
        deaf.setattr(reconciler, "_hear", lambda said: None)
        apart.buses[host].whole.set()
        with pytest.raises(HostNotReady):
            await reconciler.reconcile_host(host)
        assert sorted(apart.runs_on(instance.id)) == sorted([host, str(ended.host)])
    await apart.until_up(host, up=True)
    assert apart.runs_on(instance.id) == [ended.host]


async def test_evacuation_that_only_its_own_deafness_allowed_is_refused_when_the_host_answers(apart: Apart) -> None:
    """An API that has just started has heard nothing of any host."""
    instance = await apart.created()
    view = apart.control.hosts.get(instance.host or "")
    assert view is not None
    heard_at, view.heard_at = view.heard_at, None
    try:
        await apart.control.lifecycle.evacuate(apart.context(roles=("admin",)), instance, EvacuateArguments())
    finally:
        view.heard_at = heard_at
    await apart.settled()
    ended = await apart.fetch(instance.id)
    assert (ended.vm_state, ended.host, apart.runs_on(instance.id)) == (VmState.ACTIVE, instance.host, [instance.host])
    assert (await apart.last_operation(instance.id)).result == "Error"


async def test_agent_that_restarts_works_again_after_its_cloud_has_looked_at_it(apart: Apart) -> None:
    instance = await apart.created()
    host = instance.host or ""
    await apart.agents[host].close()
    apart.agents[host] = apart.agent(host)
    await apart.agents[host].open()
    assert apart.agents[host]._admission.is_shut(host)
    await apart.control.lifecycle.stop(apart.context(), instance)
    await apart.settled()
    assert (await apart.fetch(instance.id)).vm_state is VmState.STOPPED
    assert not apart.agents[host]._admission.is_shut(host)
    await apart.agents[host].close()
