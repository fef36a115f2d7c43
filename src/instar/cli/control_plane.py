"""Everything of a cloud but its port, in one process: database, bus, services, hosts, conductor.

Called by `embedded.py`, and by tests that break operations. What is below opens first and closes last; what an earlier
process left unfinished is taken up before `open` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from instar.agent.agent import Agent
from instar.agent.fence import Fence
from instar.bus.contract import Bus
from instar.cli.backends import claim_database, embedded_bus, embedded_store
from instar.cli.conductor_part import ConductorPart
from instar.cli.services import Part, Services
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.hypervisor.contract import Hypervisor
from instar.scheduling.host_table import HostTable
from instar.store.flavors import bootstrap_flavors

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_boot_id() -> str:
    """The kernel's id of this start of the machine."""
    return BOOT_ID.read_text(encoding="ascii").strip()


class ControlPlane:
    """Everything but the port. `hypervisors` are the hosts, by name."""

    def __init__(
        self,
        state: StateDir,
        settings: Settings,
        hypervisors: Mapping[str, Hypervisor],
        *,
        boot_id: Callable[[], str] = machine_boot_id,
        agents_apart: Callable[[Bus, HostTable], Part] | None = None,
    ) -> None:
        """`agents_apart` makes what starts further hosts' agents, in processes of their own, on the bus."""
        self.settings = settings
        self._state = state
        self.store = embedded_store(state, settings)
        self.bus = embedded_bus(settings)
        self.services = services = Services(state, settings, self.store, self.bus, storage_patience_s=None)
        self.images, self.networks, self.volumes = services.images, services.networks, services.volumes
        self.hosts, self.scheduler, self.ports = services.hosts, services.scheduler, services.ports
        self.cloud, self.lifecycle = services.cloud, services.lifecycle
        # Nobody else uses this database: the lock on the directory says so.
        self.working = ConductorPart(services, alone=True)
        self.conductor, self.reconciler = self.working.conductor, self.working.reconciler
        self.progress, self.timers = self.working.progress, self.working.timers
        self.agent = Agent(hypervisors, self.bus, Fence(state.fences), settings.host, boot_id=boot_id)
        self._agents_apart = agents_apart(self.bus, self.hosts) if agents_apart is not None else None
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        """Raises StartupError; what was opened is closed again then."""
        try:
            await self._enter(self.store)
            if self.settings.database:
                await claim_database(self.store, self._state.cloud_id)
            await bootstrap_flavors(self.store)
            await self._enter(self.bus)
            await self._enter(self.services)
            # Who listens to hosts' reports comes before the agent, who reports at once; the conductor finds hosts up.
            self._stack.push_async_callback(self.conductor.close)  # it joins here already, and hosts may fail to start
            await self._enter(self.working.kept)
            await self._enter(self.agent)
            if self._agents_apart is not None:
                await self._enter(self._agents_apart)
            await self._enter(self.conductor)
        except BaseException:
            await self.close()
            raise

    async def _enter(self, part: Part) -> None:
        await part.open()
        self._stack.push_async_callback(part.close)

    async def close(self) -> None:
        await self._stack.aclose()
