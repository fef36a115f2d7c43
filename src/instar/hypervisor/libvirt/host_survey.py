"""What a host has, and what is on it: its inventory and its census. The driver calls it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from instar.hypervisor.contract import HostNetwork
from instar.hypervisor.libvirt import domains, ownership, set_aside
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.hypervisor.libvirt.questions import HostCapabilities, read_capabilities
from instar.model.guest import HostCensus, HostInventory

GIB = 1 << 30


class HostSurvey:
    """`host_ip` is where other hosts reach this one; `machine_shares` hosts divide memory and disk of the machine."""

    def __init__(
        self,
        connection: LibvirtConnection,
        paths: HostPaths,
        images: ImageCache,
        network: HostNetwork,
        *,
        host: str,
        host_ip: str,
        machine_shares: int,
    ) -> None:
        self._connection, self._paths, self._images, self._network = connection, paths, images, network
        self._host, self._host_ip, self._shares = host, host_ip, machine_shares
        self._capabilities: HostCapabilities | None = None

    def forget(self) -> None:
        """libvirt was away: it may be another version that came back."""
        self._capabilities = None

    async def inventory(self, virt_type: str) -> HostInventory:
        able = self._capabilities
        if able is None:  # `forget` may come at any moment
            able = self._capabilities = await self._connection.run(read_capabilities)
        known = await asyncio.to_thread(self._paths.instance_ids)
        cloud_id = self._paths.cloud_id

        def read(connection: Any) -> tuple[list[Any], int]:
            states = domains.list_ours(connection, cloud_id, frozenset(known))
            return connection.getInfo(), sum(1 for state in states.values() if state.domain_id is not None)

        info, running = await self._connection.run(read)
        room = await asyncio.to_thread(os.statvfs, self._paths.state_dir)
        return HostInventory(
            vcpus=int(info[2]),
            memory_mib=int(info[1]) // self._shares,
            disk_gib=room.f_blocks * room.f_frsize // GIB // self._shares,
            free_disk_gib=room.f_bavail * room.f_frsize // GIB // self._shares,
            hypervisor_type="QEMU",
            hypervisor_version=able.hypervisor_version,
            hypervisor_hostname=self._host,
            cpu_arch=able.arch,
            cpu_model=able.cpu_model,
            cpu_features=able.cpu_features,
            virt_type=virt_type,
            host_ip=self._host_ip,
            running_vms=running,
        )

    async def census(self) -> HostCensus:
        dirs = await asyncio.to_thread(self._paths.instance_ids)
        owned, aside = await asyncio.to_thread(self._owned_directories)
        cloud_id = self._paths.cloud_id
        guests = await self._connection.run(lambda connection: domains.list_ours(connection, cloud_id, frozenset(dirs)))
        taps, networks = await self._network.census()
        return HostCensus(
            guests=guests,
            instance_dirs=owned,
            set_aside=aside,
            taps=taps,
            networks=networks,
            with_ports=self._network.instances_with_ports(),
            cached_images=await asyncio.to_thread(self._paths.cached_images),
            damaged_images=self._images.damaged(),
        )

    def _owned_directories(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Instances with a directory of this host, and those with something aside. Blocking."""
        paths, host = self._paths, self._host
        owned = (name for name in paths.instance_ids() if ownership.is_owned_by(paths.instance(name), host))
        return tuple(owned), tuple(name for name in paths.aside_ids() if set_aside.is_aside(paths, name, host))
