"""Two libvirt hosts between which guests move: two private libvirtds, two state directories, streams over loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import msgspec

from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.network import NetworkDefinition
from instar.model.stream import StreamAddress
from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.streams.server import StreamServer

from .apart_daemon import ApartDaemon
from .harness import Harness
from .libvirt_harness import LibvirtHarness

SETTINGS = LibvirtSettings(transfer_idle_s=3.0, unplug_timeout_s=5.0)
BOOTS_AT = 0x8000  # where the tiny guest has the sector that counts its boots
REAL_MODE_BYTES = 512


class CuttableClient(StreamClient):
    """While `is_cut` peers are looked for where nobody listens."""

    is_cut = False

    async def fetch_file(
        self,
        peer: StreamAddress,
        name: str,
        target: Path,
        *,
        progress: Callable[[int, int], None] | None = None,
        deadline_s: float,
    ) -> None:
        if self.is_cut:
            peer = msgspec.structs.replace(peer, port=1)
        await super().fetch_file(peer, name, target, progress=progress, deadline_s=deadline_s)


class StreamHost(LibvirtHarness):
    """A host with streams of its own. `boot_mark` reads the guest's memory."""

    server: StreamServer
    client: CuttableClient
    shared: NetworkDefinition | None = None

    @classmethod
    async def made(cls, apart: ApartDaemon, directory: Path, name: str, settings: LibvirtSettings) -> StreamHost:
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
        identity = await asyncio.to_thread(StreamIdentity.open, directory / "streams")
        server = StreamServer(identity, host=name, listen="127.0.0.1")
        await server.open()
        client = CuttableClient(identity, host=name)
        host = cls(apart.daemon, directory, settings, name=name, namespace=apart.namespace, streams=server, fetches=client)
        host.server, host.client = server, client
        await host.hypervisor.open(host.events.append)
        return host

    def network(self) -> NetworkDefinition:
        return self.shared or super().network()

    async def boot_mark(self, instance_id: str) -> str:
        def peek(domain: Any) -> str:
            held: bytes = domain.memoryPeek(BOOTS_AT, REAL_MODE_BYTES, libvirt.VIR_MEMORY_PHYSICAL)
            return held.hex()

        return str(await self._with_domain(instance_id, peek))

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            await self.client.close()
            await self.server.close()


class LibvirtTwoHosts:
    """See two_hosts.TwoHosts."""

    def __init__(self, source: StreamHost, target: StreamHost) -> None:
        self.source, self.target = source, target
        target.shared = source.network()

    @classmethod
    async def opened(
        cls, daemons: tuple[ApartDaemon, ApartDaemon], directory: Path, settings: LibvirtSettings = SETTINGS
    ) -> LibvirtTwoHosts:
        first = await StreamHost.made(daemons[0], directory / "first", "first", settings)
        try:
            second = await StreamHost.made(daemons[1], directory / "second", "second", settings)
        except BaseException:
            await first.close()
            raise
        return cls(first, second)

    async def boot_mark(self, host: Harness, instance_id: str) -> str:
        assert isinstance(host, StreamHost)
        return await host.boot_mark(instance_id)

    async def cut(self) -> None:
        self.target.client.is_cut = True

    async def mend(self) -> None:
        self.target.client.is_cut = False

    async def slow_down(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        try:
            await self.source.close()
        finally:
            await self.target.close()
