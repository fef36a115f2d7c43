"""A control plane whose hosts have an agent each, on buses that can be cut: for tests of hosts that fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from instar.agent.agent import Agent
from instar.agent.fence import Fence
from instar.bus.contract import Bus, CommandHandler, EventHandler, Message, Reply, Subscription
from instar.cli.services import Together
from instar.config import EngineSettings, HostSettings
from instar.lifecycle.evacuate import EvacuateArguments
from instar.model.instance import Instance
from instar.model.states import PowerState
from tests.lifecycle.databases import database_made
from tests.lifecycle.harness import SETTINGS, Plane
from tests.lifecycle.watching import until

QUICK = msgspec.structs.replace(
    SETTINGS,
    engine=EngineSettings(poll_s=0.1, lease_s=2.0, step_deadline_s=3),
    host=HostSettings(heartbeat_s=0.1, down_after_s=1.5, lost_after_s=1.5, power_sync_s=60),
)


class CutBus:
    """The bus as one agent has it. While it is cut nothing comes through; commands wait in their queue, as a broker keeps
    them, and come when the agent is back, as do answers to what it was told before."""

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
            reply = await handler(message)
            await self.whole.wait()
            return reply

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
    """Each host has an agent of its own, on a bus that can be cut. `boots`: the start of each host's machine."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, QUICK)
        self.buses = {host: CutBus(self.control.bus) for host in self.hosts}
        self.noting = {host: Noting(self.world.host(host)) for host in self.hosts}
        self.boots = dict.fromkeys(self.hosts, "boot-1")
        self.agents = {host: self.agent(host) for host in self.hosts}
        self.control.agent = Together(*self.agents.values())  # type: ignore[assignment]

    def agent(self, host: str) -> Agent:
        fence = Fence(self.state.path / f"fences-{host}")
        hypervisors: Any = {host: self.noting[host]}
        return Agent(hypervisors, self.buses[host], fence, self.control.settings.host, boot_id=lambda: self.boots[host])  # type: ignore[arg-type]

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


@asynccontextmanager
async def apart_plane(directory: Path, image_file: Path) -> AsyncIterator[Apart]:
    await database_made(directory)
    one = Apart(directory)
    await one.control.open()
    try:
        await one.prepare(image_file)
        for host in one.hosts:
            await one.until_up(host, up=True)
        yield one
    finally:
        for host, bus in one.buses.items():
            bus.whole.set()
            one.world.host(host).faults.release()
        await one.control.close()
        one.world.close()
