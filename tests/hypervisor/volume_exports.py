"""Volumes for the tests of the libvirt driver: raw files, each served by a qemu-nbd of its own."""

from __future__ import annotations

import secrets
import socket
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import msgspec

from instar.model.volume import VolumeConnection, VolumeGateway
from instar.nbd.relay import Key, Relay, RelayExport, RelayPlan, UnixSource
from tests.patience import PATIENCE_S


class VolumeExports:
    """`close` ends the servers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._gateways: list[Relay] = []

    def serve(self, size_bytes: int, *, over_tcp: bool = False) -> VolumeConnection:
        """Blocking: returns when it can be reached."""
        self.directory.mkdir(parents=True, exist_ok=True)
        export = uuid4().hex
        path, ready = self.directory / export, self.directory / f"{export}.pid"
        with path.open("xb") as file:
            file.truncate(size_bytes)
        if over_tcp:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            where = ["-b", "127.0.0.1", "-p", str(port)]
            connection = VolumeConnection(export, address="127.0.0.1", port=port, size_bytes=size_bytes)
        else:
            listening = f"/tmp/instar-test-{export}.sock"
            where = ["-k", listening]
            connection = VolumeConnection(export, socket=listening, size_bytes=size_bytes)
        command = ["qemu-nbd", "-t", "-f", "raw", "-x", export, "--shared=0", "--pid-file", str(ready), *where, str(path)]
        self._start(export, command)
        deadline = time.monotonic() + PATIENCE_S
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return connection

    def _start(self, export: str, command: list[str]) -> None:
        self._commands[export] = command
        self._servers[export] = subprocess.Popen(command)

    def kill(self, connection: VolumeConnection) -> None:
        """Its server dies. Blocking."""
        self._servers[connection.export].kill()
        self._servers[connection.export].wait(timeout=PATIENCE_S)

    def revive(self, connection: VolumeConnection) -> None:
        """It is served again, as before."""
        assert connection.socket is not None
        Path(connection.socket).unlink(missing_ok=True)
        self._start(connection.export, self._commands[connection.export])

    def afar(self, connection: VolumeConnection) -> VolumeConnection:
        """As hosts are told that are on another machine than the socket. Blocking."""
        assert connection.socket is not None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        key = Key("a-host", secrets.token_hex(32))
        source = UnixSource(connection.socket, connection.export)
        gateway = Relay(Path(f"/tmp/instar-test-{connection.export}"), "g")
        gateway.ensure(RelayPlan(source, (RelayExport("out", writable=True, key=key),), "127.0.0.1", port))
        self._gateways.append(gateway)
        told = VolumeGateway("127.0.0.1", port, "out", key.user, key.secret)
        return msgspec.structs.replace(connection, place="another machine", gateway=told)

    def close(self) -> None:
        for gateway in self._gateways:
            gateway.end()
        self._gateways.clear()
        for server in self._servers.values():
            server.terminate()
            server.wait(timeout=PATIENCE_S)
        self._servers.clear()
