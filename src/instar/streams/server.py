"""Gives out files and unix sockets of a host to the peers that they were granted to. The agent owns one.

A peer must show, in the TLS handshake, a certificate that something is granted to at that moment; then it names one of its
grants. Not granted, no longer granted and granted to another are the same answer.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
import time
from pathlib import Path

import structlog

from instar.errors import StartupError
from instar.model.stream import StreamAddress
from instar.streams.bandwidth import Bandwidth
from instar.streams.cut import Cut, StreamCut
from instar.streams.grants import Grant, Grants, Kind
from instar.streams.identity import StreamIdentity
from instar.streams.pump import Pump
from instar.streams.running import Running
from instar.streams.send import FileSender
from instar.streams.wire import (
    HANDSHAKE_MAX_S,
    IDLE_MAX_S,
    PROTOCOL,
    Accepted,
    Hello,
    OpenFile,
    OpenSocket,
    Refused,
    WireError,
    prepare,
    receive,
    send,
)

log = structlog.get_logger()

UNNAMED_MAX = 64  # connections that have not said yet what they want, or may not be who they are
ACCEPT_PAUSE_S = 0.2  # after the process ran out of descriptors


class StreamServer:
    """`open` before `address`. `advertise` is what peers connect to, where `listen` is a wildcard; port 0: any free one."""

    def __init__(
        self,
        identity: StreamIdentity,
        *,
        host: str,
        listen: str,
        port: int = 0,
        advertise: str = "",
        bandwidth_max_bytes_s: int = 0,
        connections_max: int = 256,
    ) -> None:
        self._identity, self._host = identity, host
        self._listen, self._port, self._advertise = listen, port, advertise or listen
        self._bandwidth = Bandwidth(bandwidth_max_bytes_s)
        self._grants = Grants()
        self._running = Running(connections_max)
        self._listener: socket.socket | None = None
        self._context_lock = threading.Lock()
        self._context: tuple[frozenset[str], ssl.SSLContext] | None = None

    async def open(self) -> None:
        """Raises StartupError when the address is taken or not of this host."""
        family = socket.AF_INET6 if ":" in self._listen else socket.AF_INET
        try:
            self._listener = socket.create_server((self._listen, self._port), family=family, backlog=128)
        except OSError as error:
            where = f"{self._listen} port {self._port}"
            raise StartupError(f"Streams of host {self._host} cannot listen on {where}: {error.strerror}.") from error
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), name="stream-accept", daemon=True).start()

    async def close(self) -> None:
        """Nothing is given out any more, and what runs is cut."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # close alone would leave the thread in accept
            listener.close()
        await self._running.close()

    @property
    def address(self) -> StreamAddress:
        return StreamAddress(
            host=self._host, address=self._advertise, port=self._port, certificate=self._identity.certificate
        )

    def grant_file(self, to: StreamAddress, name: str, path: Path, *, valid_s: float) -> None:
        """`to` may fetch the file under this name, if it begins within `valid_s`; granting again prolongs. The file must
        not change meanwhile. Grants end with the process. Raises StreamRefused: the name or certificate is bad."""
        self._grants.add(Kind.FILE, to, name, path, valid_s=valid_s)

    def grant_socket(self, to: StreamAddress, name: str, path: Path, *, valid_s: float) -> None:
        """`to` may connect to the unix socket of this name, as often as it likes for `valid_s`. Raises StreamRefused."""
        self._grants.add(Kind.SOCKET, to, name, path, valid_s=valid_s)

    def revoke(self, prefix: str) -> None:
        """Names at or under `prefix` (`disk/1` is under `disk`, not under `di`) are granted to nobody, running streams of
        them are cut."""
        self._grants.revoke(prefix)
        self._running.cut_under(prefix)

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is not None:
            try:
                plain, _ = listener.accept()
            except OSError:
                if self._listener is None:
                    return
                time.sleep(ACCEPT_PAUSE_S)
                continue
            full = self._running.unnamed_count() >= UNNAMED_MAX
            if full or not self._running.start(lambda cut, plain=plain: self._serve(plain, cut), "stream-server"):  # type: ignore[misc]  # mypy cannot infer a lambda's default
                log.warning("stream.full", host=self._host)
                plain.close()

    def _serve(self, plain: socket.socket, cut: Cut) -> None:
        """One connection, from its handshake to its end. Runs in its own thread."""
        name = ""
        try:
            prepare(plain)
            plain.settimeout(HANDSHAKE_MAX_S)
            with self._trusting().wrap_socket(plain, server_side=True, do_handshake_on_connect=False) as secure:
                cut.own(secure)
                secure.do_handshake()
                send(secure, Hello(PROTOCOL))
                asked = receive(secure)
                if not isinstance(asked, OpenFile | OpenSocket):
                    raise WireError("it asked for nothing")
                name = asked.name
                self._running.name(cut, name)  # before looking at the grant: a revoke from now on finds one or the other
                secure.settimeout(IDLE_MAX_S)
                self._answer(secure, asked, cut)
        except StreamCut:
            log.info("stream.cut", host=self._host, name=name)
        except (OSError, WireError) as error:
            # Nobody's certificate is told: a wrong one is as common as a port scan.
            log.info("stream.broken", host=self._host, name=name, cut=cut.done, error=str(error))
        except Exception:
            log.exception("stream.failed", host=self._host, name=name)
        finally:
            plain.close()

    def _trusting(self) -> ssl.SSLContext:
        """A context that lets in those to whom something is granted now."""
        certificates = self._grants.certificates()
        with self._context_lock:
            if self._context is None or self._context[0] != certificates:
                self._context = certificates, self._identity.server_context(sorted(certificates))
            return self._context[1]

    def _answer(self, secure: ssl.SSLSocket, asked: OpenFile | OpenSocket, cut: Cut) -> None:
        peer = hashlib.sha256(secure.getpeercert(binary_form=True) or b"").digest()
        kind = Kind.FILE if isinstance(asked, OpenFile) else Kind.SOCKET
        grant = self._grants.find(kind, asked.name, peer)
        if grant is None:
            log.warning("stream.refused", host=self._host, name=asked.name)
            send(secure, Refused("not granted"))
        elif isinstance(asked, OpenFile):
            started = time.monotonic()
            sender = FileSender(secure, self._bandwidth, cut)
            try:
                sender.send(grant.path, asked)
            finally:
                took_s = round(time.monotonic() - started, 3)
                log.info("stream.sent", host=self._host, name=asked.name, bytes=sender.sent_bytes, took_s=took_s)
        else:
            self._join(secure, grant, cut)

    def _join(self, secure: ssl.SSLSocket, grant: Grant, cut: Cut) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
            cut.own(plain)
            plain.settimeout(HANDSHAKE_MAX_S)
            try:
                plain.connect(str(grant.path))
            except OSError:
                send(secure, Refused("unavailable"))
                return
            send(secure, Accepted())
            Pump(plain, secure, cut).run()
