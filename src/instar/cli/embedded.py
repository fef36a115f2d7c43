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

from instar.api.service import compute_service
from instar.bus.contract import Bus
from instar.cli.clouds_yaml import Passwords, read_passwords, write_clouds
from instar.cli.control_plane import ControlPlane
from instar.cli.guest_image import ensure_tiny
from instar.cli.hosts.local_hosts import LocalHosts
from instar.cli.libvirt_host import STREAMS, libvirt_host, linux_network, open_streams
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.consoles.proxy import ConsoleProxy
from instar.consoles.service import console_service, console_websockets
from instar.errors import InstarError
from instar.http.app import build_app
from instar.http.server import HttpServer
from instar.hypervisor.contract import Hypervisor
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI, PrivateDaemon, system_libvirtd_usable
from instar.hypervisor.linux_network.links import host_routes
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.identity.api import identity_service
from instar.identity.bootstrap import bootstrap, is_bootstrapped, new_password
from instar.identity.local import LocalIdentity
from instar.images.api import image_api
from instar.networks.addresses import pick_free_cidr
from instar.networks.api import network_service
from instar.operator.service import operator_service
from instar.scheduling.host_table import HostTable
from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.volumes.api import volume_service


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
        state.lock()
        self._stack.callback(state.unlock)
        apart = self._hosts_apart()
        hypervisors = await self._hypervisors() if apart is None else {}
        control = self.control = ControlPlane(state, settings, hypervisors, agents_apart=apart)
        await control.open()
        self._stack.push_async_callback(control.close)
        self._stack.push_async_callback(self._look_for_guests, hypervisors)
        identity = LocalIdentity(control.store, settings, state.path)
        await identity.start()
        self._stack.push_async_callback(identity.close)
        await control.networks.bootstrap(await self._free_cidr())
        await ensure_tiny(control.store, control.images, self._progress)
        passwords = await self._first_users(identity)
        services = [
            identity_service(identity),
            image_api(control.images, list_limit_max=settings.api.list_limit_max),
            network_service(control.networks, settings),
            volume_service(control.volumes, list_limit_max=settings.api.list_limit_max),
            compute_service(control.cloud, control.lifecycle, control.hosts, identity),
            operator_service(control.cloud, control.hosts),
            await asyncio.to_thread(console_service, settings.console),
        ]
        websockets = console_websockets(await self._console_proxy(control))
        app = build_app(services, identity, body_max_bytes=settings.api.body_max_bytes, websockets=websockets)
        server = HttpServer(app, settings.api.host, settings.api.port)
        url = f"http://{settings.api.host}:{await server.start()}"
        self._stack.push_async_callback(server.stop)
        identity.base_url = url
        if passwords is not None:
            await asyncio.to_thread(write_clouds, state.clouds_yaml, url, settings.region, passwords)
        return url

    async def _console_proxy(self, control: ControlPlane) -> ConsoleProxy:
        """Hosts let this process in by the same key that the host in this process has, if there is one."""
        identity = await asyncio.to_thread(StreamIdentity.open, self._state.path / STREAMS)
        streams = StreamClient(identity, host=socket.gethostname())
        self._stack.push_async_callback(streams.close)
        settings = self._settings
        return ConsoleProxy(
            control.lifecycle.consoles, streams, settings.console, base_url=settings.api.console_base_url
        )

    async def _first_users(self, identity: LocalIdentity) -> Passwords | None:
        """Passwords are written down before they are in force: a crash between the two costs nobody the cloud."""
        passwords = await asyncio.to_thread(read_passwords, self._state.clouds_yaml)
        if passwords is None:
            if await is_bootstrapped(identity):
                self._progress(f"{self._state.clouds_yaml} is gone: put it back, nobody else knows its passwords")
                return None
            passwords = Passwords(new_password(), new_password())
            provisional = f"http://{self._settings.api.host}:{self._settings.api.port}"
            await asyncio.to_thread(
                write_clouds, self._state.clouds_yaml, provisional, self._settings.region, passwords
            )
        await bootstrap(identity, admin_password=passwords.admin, demo_password=passwords.demo)
        return passwords

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
            count = self._settings.simulated.hosts
            width = len(str(count - 1))
            return {f"sim-{number:0{width}}": world.host(f"sim-{number:0{width}}") for number in range(count)}
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

    async def _free_cidr(self) -> str:
        """A /24 for the first network; where it is real, one that no route of this machine has."""
        routes = await host_routes() if self._settings.hypervisor == "libvirt" else []
        return pick_free_cidr([str(route.destination) for route in routes], seed=self._state.cloud_id)

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
