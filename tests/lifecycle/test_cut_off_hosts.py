"""A host that is cut off with a running guest, which is evacuated; then it comes back, with commands that waited for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from instar.agent.agent import Agent
from instar.agent.fence import Fence
from instar.bus.contract import Bus, CommandHandler, EventHandler, Message, Reply, Subscription
from instar.cli.services import Together
from instar.config import EngineSettings, HostSettings
from instar.errors import BadRequest
from instar.lifecycle.evacuate import EvacuateArguments
from instar.model.commands import HOST_QUEUE, EnsureRunning
from instar.model.guest import GuestDefinition
from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from tests.lifecycle.databases import database_made
from tests.lifecycle.harness import SETTINGS, Plane
from tests.lifecycle.watching import check_no_trace, until

QUICK = msgspec.structs.replace(
    SETTINGS,
    engine=EngineSettings(poll_s=0.1, lease_s=2.0, step_deadline_s=3),
    host=HostSettings(heartbeat_s=0.1, down_after_s=1.5, lost_after_s=1.5, power_sync_s=60),
)


class CutBus:
    """The bus as one agent has it. While it is cut nothing comes through; commands wait in their queue, as a broker keeps
    them, and come when the agent is back."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.whole = asyncio.Event()
        self.whole.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def publish(self, topic: str, message: Message) -> None:
        if self.whole.is_set():
            await self._bus.publish(topic, message)

    async def serve(self, queue: str, handler: CommandHandler, *, concurrency_max: int) -> Subscription:
        async def late(message: Message) -> Reply:
            await self.whole.wait()
            return await handler(message)

        return await self._bus.serve(queue, late, concurrency_max=concurrency_max)

    async def subscribe(self, topic: str, handler: EventHandler) -> Subscription:
        async def heard(message: Message) -> None:
            if self.whole.is_set():
                await handler(message)

        return await self._bus.subscribe(topic, heard)


class Noting:
    """A host that notes what it is told to change."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("ensure_"):
            self.told.append(name)
        return getattr(self._host, name)


class Apart(Plane):
    """Each host has an agent of its own, on a bus that can be cut."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, QUICK)
        self.buses = {host: CutBus(self.control.bus) for host in self.hosts}
        self.noting = {host: Noting(self.world.host(host)) for host in self.hosts}
        self.agents = {host: self.agent(host) for host in self.hosts}
        self.control.agent = Together(*self.agents.values())  # type: ignore[assignment]

    def agent(self, host: str) -> Agent:
        fence = Fence(self.state.path / f"fences-{host}")
        hypervisors: Any = {host: self.noting[host]}
        return Agent(hypervisors, self.buses[host], fence, self.control.settings.host, boot_id=lambda: "boot-1")  # type: ignore[arg-type]

    def runs_on(self, instance_id: str) -> list[str]:
        states = {host: self.world.host(host)._machine.state_of(instance_id) for host in self.hosts}
        return [host for host, state in states.items() if state.power_state is PowerState.RUNNING]

    async def until_up(self, host: str, *, up: bool) -> None:
        async def is_so() -> bool:
            view = self.control.hosts.get(host)
            return view is not None and (self.control.hosts.is_up(host) and not view.shut) is up

        await until(f"{host} is {'up, and admitted' if up else 'down'}", is_so)

    async def evacuated(self, instance: Instance) -> Instance:
        await self.control.lifecycle.evacuate(self.context(roles=("admin",)), instance, EvacuateArguments())
        await self.settled()
        return await self.fetch(instance.id)


@pytest.fixture
async def apart(tmp_path: Path, image_file: Path) -> AsyncIterator[Apart]:
    await database_made(tmp_path / "cloud")
    one = Apart(tmp_path / "cloud")
    await one.control.open()
    try:
        await one.prepare(image_file)
        for host in one.hosts:
            await one.until_up(host, up=True)
        yield one
    finally:
        for bus in one.buses.values():
            bus.whole.set()
        await one.control.close()
        one.world.close()


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
