"""WebSockets beside the services: routes, what a handler is given, and the protocol with its bounds.

A WebSocket carries no API call: browsers cannot send a token in its headers. So a handler sees to access by itself, before
it accepts. Called by `app.App`; handlers are given to `build_app` by the program.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from instar.http.request import QUERY_FIELDS_MAX, Receive, Scope

MESSAGE_MAX_BYTES = 1 << 20
PING_EVERY_S = 20.0
PONG_WITHIN_S = 60.0  # what waits to be sent comes before the ping: a slow line is not a dead one
CLOSE_REASON_MAX_BYTES = 120


class WebSocket:
    """One connection, not accepted yet: first `accept` or `refuse`, once."""

    def __init__(self, scope: Scope, receive: Receive, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self.path: str = scope["path"]
        self.subprotocols: list[str] = list(scope.get("subprotocols", []))
        self._scope = scope
        self._receive = receive
        self._send = send
        self.answered = False  # accepted or refused

    def header(self, name: bytes) -> str:
        """The value of a header (name in lower case); empty when it is absent, the last one when it is repeated."""
        found = [value for key, value in self._scope["headers"] if key == name]
        return found[-1].decode("latin-1") if found else ""

    def query_one(self, name: str) -> str:
        """A query parameter; empty when it is absent, given twice, or one of too many."""
        try:
            pairs = parse_qsl(self._scope["query_string"].decode("latin-1"), max_num_fields=QUERY_FIELDS_MAX)
        except ValueError:
            return ""
        values = [value for key, value in pairs if key == name]
        return values[0] if len(values) == 1 else ""

    async def accept(self, subprotocol: str | None = None) -> None:
        await self._receive()  # the client's wish to connect
        self.answered = True
        await self._send({"type": "websocket.accept", "subprotocol": subprotocol})

    async def refuse(self, status: int, message: str) -> None:
        """Answer with an HTTP status instead; browsers show it to nobody, other clients do."""
        self.answered = True
        text = message.encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode()),
            (b"connection", b"close"),
        ]  # fmt: skip
        with contextlib.suppress(OSError):
            await self._send({"type": "websocket.http.response.start", "status": status, "headers": headers})
            await self._send({"type": "websocket.http.response.body", "body": text})

    async def receive(self) -> bytes | None:
        """The next message, text as UTF-8; None when the client closed, or went away. No more is read from the client's
        connection until this is called again."""
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            return None
        data: bytes | None = message.get("bytes")
        return data if data is not None else message.get("text", "").encode()

    async def send(self, data: bytes) -> None:
        """Waits while the client does not take what was sent before. Raises OSError when it went away."""
        await self._send({"type": "websocket.send", "bytes": data})

    async def close(self, code: int, reason: str) -> None:
        """Code 1000: all is well; 1011: something failed here; 1013: try again later."""
        with contextlib.suppress(OSError):
            await self._send({
                "type": "websocket.close", "code": code,
                "reason": reason.encode()[:CLOSE_REASON_MAX_BYTES].decode(errors="ignore"),
            })  # fmt: skip


WebSocketHandler = Callable[[WebSocket], Awaitable[None]]


class WebSocketRoute(NamedTuple):
    """`path` is the whole path, or with a `*` at its front how it ends."""

    path: str
    handler: WebSocketHandler

    def matches(self, path: str) -> bool:
        return path.endswith(self.path[1:]) if self.path.startswith("*") else path == self.path


class BoundedWebSockets(WebSocketsSansIOProtocol):
    """Logs no request lines (they hold tokens), and cuts off who does not answer a ping.

    Closing would first wait until that client has taken what was sent: it may never do that."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logger = _quiet
        self.conn.logger = _quiet
        self.conn.debug = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.handshake_initiated and self.conn.handshake_exc is not None and not self.transport.is_closing():
            # What asks for a WebSocket cannot be read as such (too long a line, too many headers): the library has an
            # answer ready, or none at all, and nobody else sends one.
            answer = b"".join(self.conn.data_to_send())
            self.transport.write(answer or b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()


_quiet = logging.getLogger("instar.http.websocket")
_quiet.setLevel(logging.CRITICAL)  # the application logs what goes wrong in it; a refusal is no error
