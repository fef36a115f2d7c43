"""The whole cloud in one process: where the rooms are put together. Called by `instar up`, the demo, and tests.

Everything that a distributed cloud has is here too, on SQLite and the memory bus: API, conductor, scheduler, agents.
What is below opens first and closes last; what an earlier process left unfinished is taken up before the port answers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial

from instar.bus.contract import Bus
from instar.cli.api_part import ApiPart
from instar.cli.clouds_yaml import write_clouds
from instar.cli.control_plane import ControlPlane
from instar.cli.first_start import ensure_first_resources, ensure_first_users
from instar.cli.health_port import HealthPort, probes_of, queue_depths
from instar.cli.host_processes import simulated_names
from instar.cli.hosts.local_hosts import LocalHosts
from instar.cli.libvirt_host import libvirt_host, linux_network, open_streams
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.errors import InstarError
from instar.hypervisor.contract import Hypervisor
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI, PrivateDaemon, system_libvirtd_usable
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.scheduling.host_table import HostTable
from instar.tracing.spans import close_traces, open_traces


class Embedded:
    """A whole cloud: what `instar up` runs. `progress` is told, in words for people, what takes a while."""

    def __init__(
        self, state: StateDir, settings: Settings, *, progress: Callable[[str], None], log_format: str = "console"
    ) -> None:
        self._state = state
        self._settings = settings
        self._progress = progress
        self._log_format = log_format
        self._stack = AsyncExitStack()
        self._has_guests = True  # until somebody looked
        self.control: ControlPlane | None = None

    async def start(self) -> str:
        """Lock the directory, bring everything up, answer on the port. Returns the URL. Raises StartupError."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop answering, then everything below. Guests go on, and so does their libvirtd while there are any."""
        await self._stack.aclose()

    async def _start(self) -> str:
        state, settings = self._state, self._settings
        open_traces(settings.tracing, "up")
        self._stack.push_async_callback(asyncio.to_thread, close_traces)
        state.lock()
        self._stack.callback(state.unlock)
        apart = self._hosts_apart()
        hypervisors = await self._hypervisors() if apart is None else {}
        control = self.control = ControlPlane(state, settings, hypervisors, agents_apart=apart)
        await control.open()
        self._stack.push_async_callback(control.close)
        self._stack.push_async_callback(self._look_for_guests, hypervisors)
        await ensure_first_resources(control.services, state, self._progress)
        api = ApiPart(control.services, state)
        self._stack.push_async_callback(api.close)
        await api.prepare()
        passwords = await ensure_first_users(api.identity, state, settings, self._progress)
        await api.open()
        probes = probes_of(store=control.store, bus=control.bus)
        watched = HealthPort(settings.metrics, probes, before=queue_depths(control.bus))
        self._stack.push_async_callback(watched.close)
        await watched.open()
        if passwords is not None:
            url = settings.api.public_url or api.url
            await asyncio.to_thread(write_clouds, state.clouds_yaml, url, settings.region, passwords)
        return api.url

    def _hosts_apart(self) -> Callable[[Bus, HostTable], LocalHosts] | None:
        """Several hosts with libvirt are processes of their own; one, and simulated ones, are in this process."""
        count = self._settings.host.local_hosts
        if self._settings.hypervisor != "libvirt" or count == 1:
            return None
        self._progress(f"starting {count} hosts")
        return partial(LocalHosts, self._state, self._settings, count=count, log_format=self._log_format)

    async def _hypervisors(self) -> dict[str, Hypervisor]:
        host = socket.gethostname()
        streams = await open_streams(self._stack, self._state.path, self._settings, name=host, address="127.0.0.1")
        if self._settings.hypervisor == "simulated":
            world = await asyncio.to_thread(SimulatedWorld, self._state.simulated_log, self._settings.simulated)
            self._stack.callback(world.close)
            world.streams = streams.server
            return {name: world.host(name) for name in simulated_names("sim-", self._settings.simulated.hosts)}
        if await system_libvirtd_usable():
            uri = SYSTEM_URI
        else:
            self._progress("starting a private libvirtd")
            daemon = PrivateDaemon(self._state.path)
            uri = await daemon.ensure_running()
            self._stack.push_async_callback(self._stop_idle, daemon)
        driver = libvirt_host(
            self._state.path, self._state.cloud_id, self._settings, name=host, uri=uri, streams=streams
        )
        return {host: driver}

    async def _look_for_guests(self, hypervisors: Mapping[str, Hypervisor]) -> None:
        """While the hosts can still be asked: a private libvirtd without guests has nothing to stay for."""
        try:
            censuses = [await hypervisor.census() for hypervisor in hypervisors.values()]
        except InstarError:
            return
        self._has_guests = any(state.domain_id is not None for one in censuses for state in one.guests.values())

    async def _stop_idle(self, daemon: PrivateDaemon) -> None:
        if not self._has_guests:
            await daemon.ensure_stopped()


async def remove_everything(state: StateDir) -> None:
    """End the guests of a cloud that does not run, and remove all that it has on this host, its directory aside.

    Raises StartupError where it runs."""
    state.lock()
    try:
        daemon = PrivateDaemon(state.path)
        system = await system_libvirtd_usable()
        uri = SYSTEM_URI if system else await daemon.ensure_running()
        hypervisor = libvirt_host(state.path, state.cloud_id, Settings(), name=socket.gethostname(), uri=uri)
        await hypervisor.open(lambda event: None)
        try:
            census = await hypervisor.census()
            for instance_id in {*census.guests, *census.instance_dirs}:
                await hypervisor.ensure_absent(instance_id, keep_disks=False)
        finally:
            await hypervisor.close()
        await linux_network(state.path, state.cloud_id).remove_everything()
        await daemon.ensure_stopped()
    finally:
        state.unlock()
