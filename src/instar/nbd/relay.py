"""An NBD export given on elsewhere: from a Unix socket to TCP for other machines, or from there to a Unix socket for QEMU.

    guest's QEMU → relay on its host (Unix socket) → TLS → gateway beside the volume → the volume's own process

Between machines everything is TLS with a key that both sides were told (TLS-PSK): who does not have it learns nothing, not
even names of exports. Both ends are processes that outlive us, so that a guest's data flows while we are restarted.
Blocking: called in threads by `keeper.py`.

    RUNTIME/NAME.keys/keys.psk   who may connect, or as whom we do; read by the process at each handshake
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from instar.nbd.daemon import StorageDaemon
from instar.nbd.monitor import Monitor, MonitorError

RECONNECT_S = 600  # a server that is away so long costs no I/O error: a machine may restart meanwhile
OPEN_MAX_S = 5  # a server that is just being started again is waited for
_DISK = "disk"
_TLS = "tls"


class Key(msgspec.Struct, frozen=True):
    """A secret that both sides of a connection know, in hexadecimal, and by which name they mean it."""

    user: str
    secret: str


class UnixSource(msgspec.Struct, frozen=True, tag=True):
    path: str
    export: str


class TlsSource(msgspec.Struct, frozen=True, tag=True):
    address: str
    port: int
    export: str
    key: Key


class RelayExport(msgspec.Struct, frozen=True):
    """`key`: with which a client connects over TCP, None on a Unix socket. `about` is for whoever made the plan."""

    name: str
    writable: bool
    key: Key | None = None
    about: str = ""


class RelayPlan(msgspec.Struct, frozen=True):
    """`address` and `port`: where it listens, None for its Unix socket. `size_bytes` is what the source was told to have:
    one that has another by now must be opened anew. `about` is for whoever made the plan."""

    source: UnixSource | TlsSource
    exports: tuple[RelayExport, ...]
    address: str | None = None
    port: int = 0
    size_bytes: int = 0
    about: str = ""


class Relay:
    def __init__(self, runtime: Path, name: str) -> None:
        self._daemon = StorageDaemon(runtime, name)
        self._keys = runtime / f"{name}.keys"
        self.socket = self._daemon.socket

    def pid(self) -> int | None:
        return self._daemon.pid()

    def ensure(self, plan: RelayPlan) -> int:
        """The process runs and serves what the plan says, and nothing else. Its pid. Raises MonitorError; what was half
        made is gone then."""
        pid = self._daemon.ensure_running()
        try:
            self._write_keys(plan)
            with self._daemon.monitor() as monitor:
                self._open(monitor, plan)
                self._serve(monitor, plan)
        except MonitorError:
            self.end()
            raise
        return pid

    def end(self) -> None:
        """The process is gone, and everything of it."""
        shutil.rmtree(self._keys, ignore_errors=True)
        self._daemon.end()

    def _open(self, monitor: Monitor, plan: RelayPlan) -> None:
        if any(node["node-name"] == _DISK for node in monitor.call("query-named-block-nodes", flat=True)):
            return
        source = plan.source
        options: dict[str, Any] = {"export": source.export, "reconnect_delay": RECONNECT_S, "open_timeout": OPEN_MAX_S}
        tls = isinstance(source, TlsSource) or plan.address is not None
        if tls:
            side = "client" if isinstance(source, TlsSource) else "server"
            given = {"username": source.key.user} if isinstance(source, TlsSource) else {}
            monitor.call("object-add", qom_type="tls-creds-psk", id=_TLS, endpoint=side, dir=str(self._keys), **given)
        if isinstance(source, TlsSource):
            options["server"] = {"type": "inet", "host": source.address, "port": str(source.port), "keep-alive": True}
            options["tls_creds"] = _TLS
        else:
            options["server"] = {"type": "unix", "path": source.path}
        monitor.call("blockdev-add", driver="nbd", node_name=_DISK, discard="unmap", **options)
        if plan.address is not None:
            address = {"type": "inet", "data": {"host": plan.address, "port": str(plan.port)}}
            monitor.call("nbd-server-start", addr=address, tls_creds=_TLS, max_connections=0)
        else:
            address = {"type": "unix", "data": {"path": str(self.socket)}}
            monitor.call("nbd-server-start", addr=address, max_connections=0)
            self._daemon.let_qemu_in()

    def _serve(self, monitor: Monitor, plan: RelayPlan) -> None:
        """Those who are no longer in the plan are cut off at once."""
        wanted = {f"e{export.name}": export for export in plan.exports}
        standing = {one["id"] for one in monitor.call("query-block-exports")}
        for export_id in standing - set(wanted):
            monitor.call("block-export-del", id=export_id, mode="hard")
        for export_id, export in wanted.items():
            if export_id not in standing:
                named = {"id": export_id, "name": export.name, "writable": export.writable}
                monitor.call("block-export-add", type="nbd", node_name=_DISK, **named)

    def _write_keys(self, plan: RelayPlan) -> None:
        keys = [plan.source.key] if isinstance(plan.source, TlsSource) else []
        keys += [export.key for export in plan.exports if export.key is not None]
        if not keys:
            return
        self._keys.mkdir(mode=0o700, exist_ok=True)
        part = self._keys / ".part"
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.writelines(f"{key.user}:{key.secret}\n" for key in keys)
        part.replace(self._keys / "keys.psk")
