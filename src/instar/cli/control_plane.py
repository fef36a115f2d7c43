"""Everything of a cloud but its port, in one process: database, bus, services, hosts, conductor.

Called by `embedded.py`, and by tests that break operations. What is below opens first and closes last; what an earlier
process left unfinished is taken up before `open` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from instar.agent.agent import Agent
from instar.agent.fence import Fence
from instar.bus.contract import Bus
from instar.bus.memory import MemoryBus
from instar.cli.state_dir import StateDir
from instar.cli.volume_images import ImagesForVolumes
from instar.config import Settings
from instar.engine.conductor import Conductor
from instar.hypervisor.contract import Hypervisor
from instar.images.local import LocalImages
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.door import Lifecycle
from instar.lifecycle.operations import operations, taken
from instar.lifecycle.progress import ProgressKeeper
from instar.lifecycle.reconcile import Reconciler
from instar.lifecycle.timers import Timers
from instar.networks.local import LocalNetworks
from instar.scheduling.host_table import HostTable
from instar.scheduling.scheduler import Scheduler
from instar.store.flavors import bootstrap_flavors
from instar.store.quotas import quota_limits
from instar.store.sqlite import SqliteStore
from instar.volumes.local import LocalVolumes

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Opened(Protocol):
    """A part of the cloud."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...


def machine_boot_id() -> str:
    """The kernel's id of this start of the machine."""
    return BOOT_ID.read_text(encoding="ascii").strip()


class ControlPlane:
    """Everything but the port: database, bus, services, hosts, conductor. `hypervisors` are the hosts, by name."""

    def __init__(
        self,
        state: StateDir,
        settings: Settings,
        hypervisors: Mapping[str, Hypervisor],
        *,
        boot_id: Callable[[], str] = machine_boot_id,
        agents_apart: Callable[[Bus, HostTable], Opened] | None = None,
    ) -> None:
        """`agents_apart` makes what starts further hosts' agents, in processes of their own, on the bus."""
        self.settings = settings
        self.store = SqliteStore(state.database, durable=settings.store.durable)
        self.bus = MemoryBus()
        self.images = LocalImages(self.store, state.path, settings.image)
        self.networks = LocalNetworks(self.store, settings.network, ports_changed=self._ports_changed)
        self.volumes = LocalVolumes(self.store, state.path, settings.volume, ImagesForVolumes(self.images))
        self.hosts = HostTable(self.store, settings)
        self.scheduler = Scheduler(self.store, self.hosts, settings)
        self.cloud = Cloud(self.store, self.bus, self.scheduler, self.images, self.networks, self.volumes, settings)
        self.lifecycle = Lifecycle(self.cloud, partial(quota_limits, self.store, settings.quota))
        self.agent = Agent(hypervisors, self.bus, Fence(state.fences), settings.host, boot_id=boot_id)
        self._agents_apart = agents_apart(self.bus, self.hosts) if agents_apart is not None else None
        # Nobody else uses this database: the lock on the directory says so.
        self.conductor = Conductor(
            self.store, self.bus, operations(self.cloud), settings.engine, alone=True, taken=taken(self.cloud),
            fell_silent=self.hosts.fell_silent,
        )
        self.reconciler = Reconciler(self.cloud, self.lifecycle)
        self.progress = ProgressKeeper(self.store, self.bus)
        self.timers = Timers(self.cloud, self.lifecycle)
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        """Raises StartupError; what was opened is closed again then."""
        try:
            await self._enter(self.store)
            await bootstrap_flavors(self.store)
            await self._enter(self.bus)
            await self._enter(self.images)
            await self._enter(self.volumes)  # guests that start find their volumes served
            self._stack.push_async_callback(self.networks.close)
            # Who listens to hosts' reports comes before the agent, who reports at once; the conductor finds hosts up.
            await self.hosts.open(self.bus)
            self._stack.push_async_callback(self.hosts.close)
            await self._enter(self.reconciler)
            await self._enter(self.progress)
            await self._enter(self.agent)
            if self._agents_apart is not None:
                await self._enter(self._agents_apart)
            self._stack.push_async_callback(self.lifecycle.prefetch.close)
            await self._enter(self.conductor)
            await self._enter(self.timers)
        except BaseException:
            await self.close()
            raise

    async def _enter(self, part: Opened) -> None:
        await part.open()
        self._stack.push_async_callback(part.close)

    async def close(self) -> None:
        await self._stack.aclose()

    async def _ports_changed(self, instance_ids: set[str]) -> None:
        await self.reconciler.refresh_ports(instance_ids)
