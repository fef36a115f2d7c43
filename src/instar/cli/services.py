"""What every process of the control plane works with: the services that operations lean on, and the door to operations.

Made by `control_plane.py` for a cloud in one process, and by each API's and each conductor's process of a larger one. What
is below opens first and closes last.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Protocol

from instar.bus.contract import Bus
from instar.cli.state_dir import StateDir
from instar.cli.volume_images import ImagesForVolumes
from instar.config import Settings
from instar.images.local import LocalImages
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.door import Lifecycle
from instar.lifecycle.port_refresh import PortRefresh
from instar.metrics import numbers
from instar.networks.local import LocalNetworks
from instar.scheduling.host_table import HostTable
from instar.scheduling.scheduler import Scheduler
from instar.store.contract import Store
from instar.store.quotas import quota_limits
from instar.volumes.local import LocalVolumes
from instar.volumes.remote_storage import RemoteStorage
from instar.volumes.service import Volumes


class Part(Protocol):
    """A part of a process. `open` raises StartupError."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...


class Together:
    """Parts as one: opened one after the other, closed in reverse. What was opened is closed again when one fails."""

    def __init__(self, *parts: Part) -> None:
        self._parts = parts
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        try:
            for part in self._parts:
                await part.open()
                self._stack.push_async_callback(part.close)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await self._stack.aclose()


class Services:
    """Images, networks, volumes, hosts and the scheduler on one database and one bus, and the lifecycle's door.

    `storage_patience_s`: so long is the process waited for that owns the volumes' data; None: this one owns them."""

    def __init__(
        self, state: StateDir, settings: Settings, store: Store, bus: Bus, *, storage_patience_s: float | None
    ) -> None:
        self.settings = settings
        self.store = store
        self.bus = bus
        self.images = LocalImages(store, state.path, settings.image)
        # With a bus between processes there are several: what hosts are to hear of networks, the keeper tells them.
        self.networks = LocalNetworks(
            store, settings.network, ports_changed=self._ports_changed, keeper_on=bus if settings.bus else None
        )
        for_volumes = ImagesForVolumes(self.images)
        self.volumes: Volumes
        if storage_patience_s is None:
            self.volumes = LocalVolumes(store, state.path, settings.volume, for_volumes)
        else:
            storage = RemoteStorage(bus, store, patience_s=storage_patience_s)
            self.volumes = Volumes(store, settings.volume, for_volumes, storage)
        self.hosts = HostTable(store, settings)
        self.scheduler = Scheduler(store, self.hosts, settings)
        self.cloud = Cloud(store, bus, self.scheduler, self.images, self.networks, self.volumes, settings)
        self.lifecycle = Lifecycle(self.cloud, partial(quota_limits, store, settings.quota))
        self.ports = PortRefresh(self.cloud)
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        """Database and bus must be open. Raises StartupError; what was opened is closed again then."""
        stack = self._stack
        try:
            await self.images.open()
            stack.push_async_callback(self.images.close)
            if isinstance(self.volumes, LocalVolumes):
                await self.volumes.open()  # guests that start find their volumes served
                stack.push_async_callback(self.volumes.close)
            await self.ports.open()
            stack.push_async_callback(self.ports.close)
            stack.push_async_callback(self.networks.close)
            await self.hosts.open(self.bus)
            numbers.hosts_from(self.hosts.states)
            stack.push_async_callback(self.hosts.close)
            stack.push_async_callback(self.lifecycle.prefetch.close)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await self._stack.aclose()

    async def _ports_changed(self, instance_ids: set[str]) -> None:
        await self.ports.refresh(instance_ids)
