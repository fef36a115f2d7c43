"""Fetches files of other hosts and connects to their unix sockets, as far as they granted it.

Agents use it for disks and live migration, the API's process for consoles.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from instar.errors import StreamBroken
from instar.model.stream import StreamAddress
from instar.streams.cut import Cut, in_thread
from instar.streams.dial import ask, dial
from instar.streams.fetch import FileFetch
from instar.streams.identity import StreamIdentity
from instar.streams.part import part_paths
from instar.streams.pump import Pump
from instar.streams.running import Running
from instar.streams.wire import OpenSocket, WireError

log = structlog.get_logger()

SOCKETS_MAX = 256  # of one client, and connections of one tunnel
REPORT_EVERY_S = 0.25
ACCEPT_PAUSE_S = 0.2


class StreamClient:
    """`host` names this side in errors about its own disk. `close` ends what runs."""

    def __init__(self, identity: StreamIdentity, *, host: str = "") -> None:
        self._identity, self._host = identity, host
        self.address = identity.address(host)  # whom to grant things to, for a process without a server
        self._running = Running(SOCKETS_MAX)

    async def close(self) -> None:
        """Sockets that were joined by `connect` are cut. Tunnels are closed by who opened them."""
        await self._running.close()

    async def fetch_file(
        self,
        peer: StreamAddress,
        name: str,
        target: Path,
        *,
        progress: Callable[[int, int], None] | None = None,
        deadline_s: float,
    ) -> None:
        """`target` is the peer's file: whole, checked, on disk, readable by its owner only, its holes still holes.

        It appears when it is whole (and replaces what is there). Until then there are two hidden files beside it; a fetch
        that ended early, however it ended, is taken up by the next one of the same name from the same peer if the source is
        unchanged, or dropped by `discard_part`. Lost connections are made anew until `deadline_s` is over. `progress` is
        called on the event loop with (bytes of the file that are done, its size), holes counted. Cancelling ends it soon.

        Raises StreamRefused (not granted any more, or another certificate: ask for a grant again), StreamBroken (the source
        changed or cannot be read, or the deadline is over), DiskFull.
        """
        cut, loop = Cut(), asyncio.get_running_loop()
        told_at = 0.0

        def report(done_bytes: int, size_bytes: int) -> None:
            nonlocal told_at
            now = time.monotonic()
            if progress is not None and (done_bytes == size_bytes or now - told_at >= REPORT_EVERY_S):
                told_at = now
                loop.call_soon_threadsafe(progress, done_bytes, size_bytes)

        fetch = FileFetch(
            self._identity, peer, name, target, host=self._host, report=report, deadline_s=deadline_s, cut=cut
        )
        await in_thread(fetch.run, cut, "stream-fetch")

    async def discard_part(self, target: Path) -> None:
        """What a fetch to `target` left unfinished is gone; a finished one stays. No fetch to it may be running."""
        for path in part_paths(target):
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def connect(self, peer: StreamAddress, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The peer's unix socket, as if it were here; either side may end its direction alone (`write_eof`). Raises
        StreamRefused, StreamBroken."""
        cut = Cut()
        secure = await in_thread(lambda: open_socket(self._identity, peer, name, cut), cut, "stream-connect")
        ours, theirs = socket.socketpair()

        def pump(running: Cut) -> None:
            with secure, theirs:
                running.own(secure)
                running.own(theirs)
                join(theirs, secure, running, name)

        if not self._running.start(pump, "stream-socket"):
            for each in (secure, ours, theirs):
                each.close()
            raise StreamBroken(what=name, host=peer.host, reason="too many sockets are connected")
        try:
            return await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise

    async def tunnel(self, local_socket: Path, peer: StreamAddress, name: str) -> Tunnel:
        """A unix socket here that stands for the peer's: each connection to it goes to the granted one. Only our own user
        may connect. A socket that an earlier tunnel left there is replaced. The caller closes the tunnel. Raises OSError
        when the socket cannot be made; the peer is not asked before somebody connects."""
        return await asyncio.to_thread(Tunnel, self._identity, local_socket, peer, name)


class Tunnel:
    """A listening unix socket. `error` is why the last connection did not come about, None while all is well."""

    def __init__(self, identity: StreamIdentity, local_socket: Path, peer: StreamAddress, name: str) -> None:
        self._identity, self._path, self._peer, self._name = identity, local_socket, peer, name
        self._running = Running(SOCKETS_MAX)
        self._closed = False
        self.error: StreamBroken | None = None
        self._listener = _listen(local_socket)
        threading.Thread(target=self._accept, name="stream-tunnel", daemon=True).start()

    async def close(self) -> None:
        """The socket is gone, and its connections are cut."""
        if self._closed:
            return
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        await asyncio.to_thread(self._path.unlink, missing_ok=True)
        await self._running.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                if not self._closed:
                    time.sleep(ACCEPT_PAUSE_S)
                continue
            if not self._running.start(lambda cut, plain=plain: self._carry(plain, cut), "stream-tunnelled"):  # type: ignore[misc]  # mypy cannot infer a lambda's default
                plain.close()

    def _carry(self, plain: socket.socket, cut: Cut) -> None:
        with plain:
            cut.own(plain)
            try:
                secure = open_socket(self._identity, self._peer, self._name, cut)
            except StreamBroken as error:
                self.error = error
                log.warning("stream.tunnel_failed", name=self._name, host=self._peer.host, error=error.message)
                return
            self.error = None
            with secure:
                join(plain, secure, cut, self._name)


def open_socket(identity: StreamIdentity, peer: StreamAddress, name: str, cut: Cut) -> ssl.SSLSocket:
    """A connection that the peer has joined to the socket it granted. Raises StreamRefused, StreamBroken, StreamCut."""
    try:
        secure = dial(identity, peer, name, cut)
        try:
            ask(secure, peer, OpenSocket(name))
        except BaseException:
            secure.close()
            raise
    except WireError as error:
        cut.check()
        raise StreamBroken(what=name, host=peer.host, reason=str(error)) from error
    return secure


def join(plain: socket.socket, secure: ssl.SSLSocket, cut: Cut, name: str) -> None:
    """Pump until the end; a loss is logged, and seen by the plain side as its connection's end. Raises StreamCut."""
    try:
        Pump(plain, secure, cut).run()
    except OSError as error:
        log.info("stream.broken", name=name, cut=cut.done, error=str(error))


def _listen(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: it is never there with another mode
        listener.bind(str(path))
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    return listener
