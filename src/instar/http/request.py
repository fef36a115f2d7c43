"""What a handler is given: one HTTP request, its verified caller, and bounded access to its body."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from instar.errors import BadRequest, TooLarge
from instar.http.body import decode
from instar.http.context import RequestContext

T = TypeVar("T")
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]

QUERY_FIELDS_MAX = 200
CHUNK_DEADLINE_S = 60.0  # a client that sends nothing of its body for so long has gone
DISCARD_DEADLINE_S = 5.0
DISCARD_MAX_BYTES = 16 << 20
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


class ClientGone(BadRequest):
    """The client went away, or stalled, before its body was complete."""


class Request:
    """One request. `params` are the path's parameters, decoded; `prefix` is the path of the service (`/compute`).

    `microversion` and `answer_headers` belong to the service's `negotiate` hook; the headers go into every answer,
    faults included."""

    __slots__ = (
        "_body_ended", "_body_max_bytes", "_headers", "_query", "_receive", "answer_headers", "context", "microversion",
        "params", "prefix", "scope",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, prefix: str, body_max_bytes: int) -> None:
        self.scope = scope
        self.prefix = prefix
        self.params: Mapping[str, str] = {}
        self.microversion: Any = None
        self.answer_headers: list[tuple[bytes, bytes]] = []
        self.context: RequestContext
        self._receive = receive
        self._body_max_bytes = body_max_bytes
        self._body_ended = False
        self._headers: dict[bytes, bytes] | None = None
        self._query: list[tuple[str, str]] | None = None

    @property
    def method(self) -> str:
        method: str = self.scope["method"]
        return method

    @property
    def path(self) -> str:
        """The whole path, prefix included, decoded: for links and messages, not for routing."""
        path: str = self.scope["path"]
        return path

    @property
    def logged_path(self) -> str:
        """The path without what opens a door: a parameter that is named after a token is not for the log."""
        path = self.path
        for name, value in self.params.items():
            if name.endswith("token") and value:
                path = path.replace(value, "***")
        return path

    @property
    def client_address(self) -> str:
        """IP address of the peer; empty where the transport has none."""
        client = self.scope.get("client")
        return client[0] if client else ""

    def header(self, name: bytes) -> str:
        """The value of a header (name in lower case); empty when it is absent, the last one when it is repeated."""
        if self._headers is None:
            self._headers = dict(self.scope["headers"])
        return self._headers.get(name, b"").decode("latin-1")

    @property
    def query(self) -> list[tuple[str, str]]:
        """All query parameters in their order. Raises BadRequest when there are too many."""
        if self._query is None:
            text = self.scope["query_string"].decode("latin-1")
            try:
                self._query = parse_qsl(text, keep_blank_values=True, max_num_fields=QUERY_FIELDS_MAX)
            except ValueError as error:
                raise BadRequest("The query has too many parameters.") from error
        return self._query

    def query_one(self, name: str) -> str | None:
        """The value of a parameter that may be given once; None when absent. Raises BadRequest when it is repeated."""
        values = self.query_all(name)
        if len(values) > 1:
            raise BadRequest(f"The query parameter {name} must be given once.")
        return values[0] if values else None

    def query_all(self, name: str) -> list[str]:
        return [value for key, value in self.query if key == name]

    @property
    def origin(self) -> str:
        """Scheme and host as the client used them, for links. Raises BadRequest for a Host header that is not one."""
        host = self.header(b"host")
        if not _HOST.fullmatch(host):
            if host:
                raise BadRequest("The Host header is not valid.")
            address, port = self.scope.get("server") or ("localhost", None)
            host = f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"
        return f"{self.scope['scheme']}://{host}"

    @property
    def base_url(self) -> str:
        """Where the service starts, as the client sees it: `http://host:port/compute`."""
        return self.origin + self.prefix

    async def body(self) -> bytes:
        """The whole body. Raises TooLarge above the setting api.body_max_bytes, ClientGone when it never ends."""
        limit = self._body_max_bytes
        declared = self.header(b"content-length")
        if declared and (not declared.isdigit() or int(declared) > limit):
            raise TooLarge(f"The request body is larger than {limit} bytes.")
        first, more = await self._chunk()
        if not more:
            if len(first) > limit:
                raise TooLarge(f"The request body is larger than {limit} bytes.")
            return first
        parts, size = [first], len(first)
        while more:
            chunk, more = await self._chunk()
            size += len(chunk)
            if size > limit:
                raise TooLarge(f"The request body is larger than {limit} bytes.")
            parts.append(chunk)
        return b"".join(parts)

    async def json(self, body_type: type[T]) -> T:
        """The body as a `body_type`. Raises BadRequest with the JSON path and the rule."""
        return decode(await self.body(), body_type)

    async def stream(self, limit_bytes: int) -> AsyncIterator[bytes]:
        """The body in chunks, for data that is never held in memory. Raises TooLarge beyond the limit, ClientGone."""
        size, more = 0, True
        while more:
            chunk, more = await self._chunk()
            size += len(chunk)
            if size > limit_bytes:
                raise TooLarge(f"The data is larger than {limit_bytes} bytes.")
            if chunk:
                yield chunk

    async def discard_body(self) -> None:
        """Reads on for a while after a refusal, so that a client that is still sending gets to see the answer:
        closing a connection with unread data resets it."""
        size = 0
        with contextlib.suppress(TimeoutError, ClientGone):
            async with asyncio.timeout(DISCARD_DEADLINE_S):
                while not self._body_ended and size < DISCARD_MAX_BYTES:
                    size += len((await self._chunk())[0])

    async def _chunk(self) -> tuple[bytes, bool]:
        try:
            async with asyncio.timeout(CHUNK_DEADLINE_S):
                message = await self._receive()
        except TimeoutError as error:
            raise ClientGone(f"No data came for {CHUNK_DEADLINE_S:g} seconds.") from error
        if message["type"] == "http.disconnect":
            raise ClientGone("The connection was closed before the body was complete.")
        more: bool = message.get("more_body", False)
        self._body_ended = not more
        return message.get("body", b""), more
