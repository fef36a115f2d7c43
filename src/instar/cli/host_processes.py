"""What an agent's process is made of: one host with libvirt, or many simulated ones, on the bus of a cloud."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import structlog

from instar.agent.agent import Agent
from instar.agent.fence import Fence
from instar.bus.contract import Bus
from instar.bus.permissions import may_speak_for_all
from instar.cli.backends import agent_bus, open_patiently
from instar.cli.control_plane import machine_boot_id
from instar.cli.health_port import HealthPort, probes_of
from instar.cli.hosts.local_host import LocalHost
from instar.cli.libvirt_host import libvirt_host, open_streams
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.hypervisor.contract import Hypervisor
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI, PrivateDaemon, system_libvirtd_usable
from instar.hypervisor.simulated.neighbours import Neighbours
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.tracing.spans import close_traces, open_traces

log = structlog.get_logger()

STOP_MAX_S = 10.0
NAMESPACE = uuid.UUID("5a2cde24-93b5-4d8e-9b57-0f1e3a4c7d61")  # of the ids that hosts have for their libvirtd
LOOPBACK = "127.0.0.1"


class HostPlace(NamedTuple):
    """What the options of an agent say: which host it serves, how others reach it, and whose libvirtd it has."""

    host: LocalHost
    address: str | None
    libvirtd: str
    shares: int


class LibvirtHostProcess:
    """One host with libvirt."""

    def __init__(self, state: StateDir, settings: Settings, place: HostPlace) -> None:
        self._state, self._settings, self._place = state, settings, place
        self._stack = AsyncExitStack()

    async def start(self) -> str:
        place, host = self._place, self._place.host
        address = place.address or LOOPBACK
        hypervisor = libvirt_host(
            host.directory,
            self._state.cloud_id,
            self._settings,
            name=host.name,
            uri=await self._libvirtd_uri(),
            address=place.address,
            machine_shares=place.shares,
            streams=await open_streams(self._stack, host.directory, self._settings, name=host.name, address=address),
        )
        fence = Fence(host.directory / "fences")
        bus = agent_bus(self._state, self._settings, name=f"instar agent {host.name}")
        await _serve(self._stack, bus, self._settings, {host.name: hypervisor}, fence)
        log.info("agent.ready", host=host.name, address=place.address)
        return f"agent of {host.name}"

    async def stop(self) -> None:
        await _close(self._stack)

    async def _libvirtd_uri(self) -> str:
        place = self._place
        if place.libvirtd == "auto" and await system_libvirtd_usable():
            return SYSTEM_URI
        # Hosts of one machine would have its id in common, and libvirt migrates no guest to where it already is.
        host_uuid = uuid.uuid5(NAMESPACE, f"{self._state.cloud_id} {place.host.name}")
        return await PrivateDaemon(place.host.directory, host_uuid=str(host_uuid)).ensure_running()


class SimulatedHostsProcess:
    """`count` simulated hosts, whose guests are records in `folder`."""

    def __init__(self, state: StateDir, settings: Settings, folder: Path, *, prefix: str, count: int) -> None:
        self._state, self._settings = state, settings
        self._folder = folder
        self._names = simulated_names(prefix, count)
        self._stack = AsyncExitStack()

    async def start(self) -> str:
        first = self._names[0]
        streams = await open_streams(self._stack, self._folder, self._settings, name=first, address=LOOPBACK)
        world = await asyncio.to_thread(SimulatedWorld, self._folder / "simulated.log", self._settings.simulated)
        self._stack.callback(world.close)
        world.streams = streams.server
        world.neighbours = Neighbours(streams.server, streams.client, world.machine)
        await world.neighbours.open()
        self._stack.push_async_callback(world.neighbours.close)
        hypervisors = {name: world.host(name) for name in self._names}
        # Thousands of queues of their own would cost the broker more than the hosts are worth: one for them all.
        bus = agent_bus(self._state, self._settings, name=f"instar agent {first}…", many=first)
        together = bool(self._settings.bus) and may_speak_for_all(self._settings.bus)
        fence = Fence(self._folder / "fences")
        await _serve(self._stack, bus, self._settings, hypervisors, fence, reports_together=together)
        log.info("agent.ready", first=first, hosts=len(hypervisors))
        return f"agent of {len(hypervisors)} simulated hosts, {first} and on"

    async def stop(self) -> None:
        await _close(self._stack)


def simulated_names(prefix: str, count: int) -> list[str]:
    """sim-000 … sim-199: as many digits as the last one needs."""
    width = len(str(count - 1))
    return [f"{prefix}{number:0{width}}" for number in range(count)]


async def _serve(
    stack: AsyncExitStack, bus: Bus, settings: Settings, hypervisors: Mapping[str, Hypervisor], fence: Fence,
    *, reports_together: bool = False,
) -> None:  # fmt: skip
    open_traces(settings.tracing, "agent")
    stack.push_async_callback(asyncio.to_thread, close_traces)
    await open_patiently(bus.open, "the bus")
    stack.push_async_callback(bus.close)
    serving = Agent(
        hypervisors, bus, fence, settings.host, boot_id=machine_boot_id, reports_together=reports_together
    )
    stack.push_async_callback(serving.close)
    await serving.open()
    watched = HealthPort(settings.metrics, probes_of(bus=bus))
    stack.push_async_callback(watched.close)
    await watched.open()


async def _close(stack: AsyncExitStack) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_MAX_S):
            await stack.aclose()
