"""Two libvirt hosts between which guests move: two private libvirtds, two state directories, streams over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import msgspec

from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.network import NetworkDefinition
from instar.model.states import PowerState
from instar.model.stream import StreamAddress
from instar.streams.client import StreamClient, Tunnel
from instar.streams.identity import StreamIdentity
from instar.streams.server import StreamServer

from .apart_daemon import ApartDaemon
from .harness import Harness
from .libvirt_harness import LibvirtHarness

SETTINGS = LibvirtSettings(transfer_idle_s=3.0, unplug_timeout_s=5.0)
BOOTS_AT = 0x8000  # where the tiny guest has the sector that counts its boots
REAL_MODE_BYTES = 512


class CuttableClient(StreamClient):
    """While `is_cut` peers are looked for where nobody listens. While `is_slow` the memory of a guest goes so slowly that
    it never ends, as that of one which changes it faster than it is sent; until the guest is held still."""

    is_cut = False
    is_slow = False

    async def tunnel(self, local_socket: Path, peer: StreamAddress, name: str) -> Tunnel:
        if not (self.is_slow and name.endswith("/memory")):
            return await super().tunnel(local_socket, peer, name)
        inner = local_socket.with_name(local_socket.name + ".fast")
        tunnel = await super().tunnel(inner, peer, name)
        return await asyncio.to_thread(SlowTunnel, self, local_socket, inner, tunnel)  # type: ignore[return-value]

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


class SlowTunnel:
    """Carries what comes to a socket on to another one, a little at a time."""

    def __init__(self, client: CuttableClient, outer: Path, inner: Path, tunnel: Tunnel) -> None:
        self._client, self._outer, self._inner, self._tunnel = client, outer, inner, tunnel
        self.error = None
        outer.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(outer))
        self._listener.listen(4)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                taken, _ = self._listener.accept()
                onward = socket.socket(socket.AF_UNIX)
                onward.connect(str(self._inner))
            except OSError:
                return
            for source, sink, slow in ((taken, onward, True), (onward, taken, False)):
                threading.Thread(target=self._pump, args=(source, sink, slow), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(4096):
                sink.sendall(chunk)
                if slow and self._client.is_slow:
                    time.sleep(0.1)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._outer.unlink(missing_ok=True)
        await self._tunnel.close()


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
        self._watcher: asyncio.Task[None] | None = None
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

    async def cut_off_target(self) -> None:
        """The source reaches nothing of the target any more."""
        self.target.server.revoke("")

    async def mend(self) -> None:
        self.target.client.is_cut = False
        self.source.client.is_slow = False

    async def slow_down(self) -> None:
        self.source.client.is_slow = True
        self._watcher = asyncio.create_task(self._until_held_still())

    async def _until_held_still(self) -> None:
        while self.source.client.is_slow:
            states = (await self.source.hypervisor.census()).guests.values()
            if any(state.power_state is PowerState.PAUSED for state in states):
                self.source.client.is_slow = False
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        await self.mend()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        try:
            await self.source.close()
        finally:
            await self.target.close()
            for host in (self.source, self.target):  # on shared storage only the last of them was without instances
                await asyncio.to_thread(host.paths.release_link)
