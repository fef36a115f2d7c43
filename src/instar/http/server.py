"""Serves an ASGI application on a port, inside the event loop that runs already. Used by the program and by tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio.events import TimerHandle
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from instar.errors import StartupError
from instar.http.websocket import MESSAGE_MAX_BYTES, PING_EVERY_S, PONG_WITHIN_S, BoundedWebSockets

log = structlog.get_logger()

Asgi = Callable[[Any, Any, Any], Awaitable[None]]  # `app.App`, or `health.HealthApp`

HEAD_MAX_BYTES = 65_536  # request line and headers
HEAD_DEADLINE_S = 20.0
REFUSED_LINGER_S = 1.0
KEEP_ALIVE_S = 65
CONNECTIONS_MAX = 2000
BACKLOG = 1024
START_DEADLINE_S = 10.0


class HttpServer:
    """One listening port. `port` 0 takes a free one: `start` says which. `shared`: other processes may have it too; each
    connection comes to one that listens."""

    def __init__(self, app: Asgi, host: str, port: int, *, shared: bool = False) -> None:
        self._host = host
        self._port = port
        self._shared = shared
        config = uvicorn.Config(
            app, http=_BoundedProtocol, lifespan="off", interface="asgi3", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S,
            limit_concurrency=CONNECTIONS_MAX, ws=BoundedWebSockets, ws_max_size=MESSAGE_MAX_BYTES,
            ws_per_message_deflate=False, ws_ping_interval=PING_EVERY_S, ws_ping_timeout=PONG_WITHIN_S,
        )  # fmt: skip
        config.load()
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listens; returns the port once it answers. Raises StartupError when the address cannot be taken."""
        listening = _listen(self._host, self._port, shared=self._shared)
        port: int = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve([listening]), name="http-server")
        async with asyncio.timeout(START_DEADLINE_S):
            while not self._server.started:
                if self._task.done():
                    self._task.result()
                    raise StartupError("The HTTP server ended while it started.")
                await asyncio.sleep(0.002)
        log.info("http.listening", host=self._host, port=port)
        return port

    async def stop(self, grace_s: float = 5.0) -> None:
        """Accepts nothing more, lets requests in flight end for `grace_s`, then cuts them off. May be called twice."""
        if self._task is None:
            return
        task, self._task = self._task, None
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        try:
            async with asyncio.timeout(grace_s + 3):
                await task
        except TimeoutError:
            log.warning("http.stop_forced", grace_s=grace_s)


class _Server(uvicorn.Server):
    """Leaves signals to the program: it has more to stop than this port."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _BoundedProtocol(HttpToolsProtocol):
    """Bounds what a client may send before its request is one: size of the head, and the time it takes."""

    _head_bytes = 0
    _head_timer: TimerHandle | None = None
    _in_head = True
    _refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head:
            if self._head_bytes > HEAD_MAX_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")
            elif self._head_timer is None:
                self._expect_head()

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_complete()  # also of what becomes a WebSocket: another protocol goes on with it
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self._refuse, b"408 Request Timeout")

    def _head_is_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes) -> None:
        """Answers, then discards what still comes for a moment: an early close would reset the answer away."""
        self._head_is_complete()
        self._refused = True
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.write_eof()
            self.loop.call_later(REFUSED_LINGER_S, self.transport.close)


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"Cannot listen on {host}: {error.strerror or error}.") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise StartupError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from error
    return listening
