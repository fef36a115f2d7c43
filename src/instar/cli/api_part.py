"""An API's part of a process: the HTTP services, consoles and identity, behind one port."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack

from instar.api.service import compute_service
from instar.cli.health_port import probes_of
from instar.cli.services import Services
from instar.cli.state_dir import STREAMS, StateDir
from instar.consoles.proxy import ConsoleProxy
from instar.consoles.service import console_service, console_websockets
from instar.http.app import build_app
from instar.http.health import HealthPages
from instar.http.server import HttpServer
from instar.identity.api import identity_service
from instar.identity.local import LocalIdentity
from instar.images.api import image_api
from instar.networks.api import network_service
from instar.operator.service import operator_service
from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.volumes.api import volume_service


class ApiPart:
    """`services` must be open before `open`; `url` is where it answers afterwards, on this machine."""

    def __init__(self, services: Services, state: StateDir) -> None:
        self.identity = LocalIdentity(services.store, services.settings, state.path, bus=services.bus)
        self.url = ""
        self._services = services
        self._state = state
        self._stack = AsyncExitStack()

    async def prepare(self) -> None:
        """Identity, which works without the port. Raises StartupError."""
        await self.identity.start()
        self._stack.push_async_callback(self.identity.close)

    async def open(self) -> None:
        """Answer on the port. `prepare` comes first. Raises StartupError."""
        services, settings, identity = self._services, self._services.settings, self.identity
        limit = settings.api.list_limit_max
        routed = [
            identity_service(identity),
            image_api(services.images, list_limit_max=limit),
            network_service(services.networks, settings),
            volume_service(services.volumes, list_limit_max=limit),
            compute_service(services.cloud, services.lifecycle, services.hosts, identity),
            operator_service(services.cloud, services.hosts),
            await asyncio.to_thread(console_service, settings.console),
        ]
        websockets = console_websockets(await self._console_proxy())
        health = HealthPages(
            probes_of(store=services.store, bus=services.bus), metrics=settings.metrics.on_api_port
        )
        app = build_app(
            routed, identity, body_max_bytes=settings.api.body_max_bytes, websockets=websockets, health=health
        )
        server = HttpServer(app, settings.api.host, settings.api.port, shared=settings.api.port_shared)
        self.url = f"http://{settings.api.host}:{await server.start()}"
        self._stack.push_async_callback(server.stop)
        identity.base_url = settings.api.public_url or self.url

    async def close(self) -> None:
        """No request is answered any more."""
        await self._stack.aclose()

    async def _console_proxy(self) -> ConsoleProxy:
        """Hosts let this process in by the same key that a host in this process has, if there is one."""
        identity = await asyncio.to_thread(StreamIdentity.open, self._state.path / STREAMS)
        streams = StreamClient(identity, host=socket.gethostname())
        self._stack.push_async_callback(streams.close)
        services = self._services
        return ConsoleProxy(
            services.lifecycle.consoles, streams, services.settings.console,
            base_url=services.settings.api.console_base_url,
        )  # fmt: skip
