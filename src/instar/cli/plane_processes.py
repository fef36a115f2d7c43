"""The control plane of a cloud of many processes: what `instar api`, `instar conductor` and `instar storage` are made of.

Each is told by the settings where database and broker are, waits for those that are away, and refuses a database that
`instar cloud init` has not prepared. The same parts make the embedded cloud: see `control_plane.py`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from instar.bus.contract import Bus
from instar.cli.api_part import ApiPart
from instar.cli.backends import open_patiently, open_store, server_bus
from instar.cli.conductor_part import ConductorPart
from instar.cli.first_start import check_initialised
from instar.cli.health_port import HealthPort, probes_of, queue_depths
from instar.cli.services import Part, Services
from instar.cli.state_dir import StateDir
from instar.cli.volume_images import ImagesForVolumes
from instar.config import Settings
from instar.images.local import LocalImages
from instar.store.contract import Store
from instar.tracing.spans import close_traces, open_traces
from instar.volumes.owner import VolumeOwner

STORAGE_FOR_REQUESTS_S = 5.0  # then the client is told to come again
STORAGE_FOR_OPERATIONS_S = 60.0


class PlaneProcess:
    """What the three have in common: the directory, the database, the bus. A Program."""

    role = ""  # as others see it: in the lists of the database and of the broker

    def __init__(self, state: StateDir, settings: Settings) -> None:
        self.state, self.settings = state, settings
        self._stack = AsyncExitStack()

    async def start(self) -> str:
        open_traces(self.settings.tracing, self.role)
        self._stack.push_async_callback(asyncio.to_thread, close_traces)
        self.state.lock(shared=True)
        self._stack.callback(self.state.unlock)
        store = open_store(self.settings, application=f"instar {self.role}", migrates=False)
        await open_patiently(store.open, "the database")
        self._stack.push_async_callback(store.close)
        await check_initialised(store)
        bus = server_bus(self.settings, name=f"instar {self.role}")
        await open_patiently(bus.open, "the bus")
        self._stack.push_async_callback(bus.close)
        works = await self.work(store, bus)
        await self.enter(HealthPort(self.settings.metrics, probes_of(store=store, bus=bus), before=queue_depths(bus)))
        return works

    async def work(self, store: Store, bus: Bus) -> str:
        """Open the rest on these, and say what the ready line says."""
        raise NotImplementedError

    async def enter(self, part: Part) -> None:
        """Open it now, close it at the end."""
        self._stack.push_async_callback(part.close)
        await part.open()

    async def stop(self) -> None:
        await self._stack.aclose()


class ApiProcess(PlaneProcess):
    """Every HTTP API; hosts and operations are others' business."""

    role = "api"

    async def work(self, store: Store, bus: Bus) -> str:
        services = Services(self.state, self.settings, store, bus, storage_patience_s=STORAGE_FOR_REQUESTS_S)
        await self.enter(services)
        api = ApiPart(services, self.state)
        self._stack.push_async_callback(api.close)
        await api.prepare()
        await api.open()
        return api.url


class ConductorProcess(PlaneProcess):
    """Runs operations; and, while it is the one of all conductors that does, sees to what no operation does."""

    role = "conductor"

    async def work(self, store: Store, bus: Bus) -> str:
        services = Services(self.state, self.settings, store, bus, storage_patience_s=STORAGE_FOR_OPERATIONS_S)
        await self.enter(services)
        part = ConductorPart(services, alone=False)
        await self.enter(part.kept)
        await self.enter(part.conductor)
        return part.conductor.id


class StorageProcess(PlaneProcess):
    """Owns the directory of the volumes: its jobs, and what serves their data."""

    role = "storage"

    async def work(self, store: Store, bus: Bus) -> str:
        images = LocalImages(store, self.state.path, self.settings.image)
        await self.enter(images)
        owner = VolumeOwner(store, self.state.path, self.settings.volume, ImagesForVolumes(images), bus=bus)
        await self.enter(owner)
        return f"volumes of {self.state.path}"
