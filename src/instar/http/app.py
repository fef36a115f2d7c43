"""The ASGI application: one port, several services; request ids, bounds, authentication, policy and faults alike.

Called by the program with what each API room offers. Plain ASGI on purpose: see docs/decisions/0005-http.md.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import structlog

from instar.errors import Forbidden, InstarError, TooLarge, Unauthorized
from instar.http.answer import Answer, Header, json_answer
from instar.http.context import RequestContext
from instar.http.faults import (
    FaultShape,
    MethodNotAllowed,
    RouteNotFound,
    TooManyHeaders,
    UriTooLong,
    compute_fault,
    describe,
    unexpected,
)
from instar.http.health import HealthPages
from instar.http.policy import Policy
from instar.http.request import ClientGone, Receive, Request, Scope
from instar.http.routing import Route, Router
from instar.http.websocket import WebSocket, WebSocketRoute
from instar.metrics import numbers
from instar.model.context import Authenticated
from instar.tracing import ids, spans

log = structlog.get_logger()

Send = Callable[[dict[str, Any]], Awaitable[None]]
Negotiate = Callable[[Request], None]

URL_MAX_BYTES = 8192
HEADERS_MAX = 100
HEADER_BYTES_MAX = 32_768
TOKEN_MAX_BYTES = 4096
_GLOBAL_REQUEST_ID = re.compile(r"req-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ANONYMOUS: frozenset[str] = frozenset()


class Authenticator(Protocol):
    """Verifies tokens: the identity service, as far as this room knows it."""

    async def authenticate_token(self, token: str) -> Authenticated:
        """Raises Unauthorized."""
        ...


class Service(NamedTuple):
    """What an API room offers. `prefix` is its path (`/compute`), `catalog_type` its type in the service catalog.

    `negotiate` is called before every handler (also when the route is unknown): it reads the microversion into the
    request, adds headers for the answer, or raises NotAcceptable. `extra_request_id` is a second header that carries
    the request id, where the API's clients look for one."""

    name: str
    catalog_type: str
    prefix: str
    routes: Sequence[Route]
    policy: Policy
    fault: FaultShape
    negotiate: Negotiate | None = None
    extra_request_id: bytes | None = None


def build_app(
    services: Sequence[Service],
    identity: Authenticator,
    *,
    body_max_bytes: int,
    websockets: Sequence[WebSocketRoute] = (),
    health: HealthPages | None = None,
) -> App:
    """The ASGI application of these services and WebSockets. Raises ValueError when a route names no rule, or two are
    the same."""
    for service in services:
        for route in service.routes:
            if route.policy not in set(service.policy):
                raise ValueError(f"{service.name}: {route.method} {route.path} names no rule: {route.policy}")
    return App(services, identity, body_max_bytes, websockets, health)


class App:
    """An ASGI application. `services` is what it serves: tests walk their routes."""

    def __init__(
        self,
        services: Sequence[Service],
        identity: Authenticator,
        body_max_bytes: int,
        websockets: Sequence[WebSocketRoute] = (),
        health: HealthPages | None = None,
    ) -> None:
        self._health = health or HealthPages({})
        self.services = tuple(services)
        self._websockets = tuple(websockets)
        self._identity = identity
        self._body_max_bytes = body_max_bytes
        self._identity_path = next((one.prefix for one in services if one.catalog_type == "identity"), "")
        self._mounts = {one.prefix.strip("/"): (one, Router(one.routes)) for one in services}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await self._websocket(WebSocket(scope, receive, send), scope)
            return
        began = time.perf_counter()
        request_id = f"req-{uuid4()}"
        ids.bind(request_id)  # each request has a task, and so a context, of its own
        raw_path: str = scope["raw_path"].decode("latin-1")
        service, router, below = self._mount(raw_path)
        request = Request(scope, receive, service.prefix if service else "", self._body_max_bytes)
        try:
            with spans.request_span(request_id, scope["method"], service.name if service else "none"):
                answer = await self._answer(request, request_id, service, router, below)
        except InstarError as error:
            if isinstance(error, TooLarge):
                await request.discard_body()
            answer = self._fault(request, service, error)
        except Exception:  # the edge of a request: whatever it is, the client gets an answer and we get a traceback
            # As text: a renderer that shows local variables would write tokens and passwords into the log.
            log.error(
                "http.unexpected", request_id=request_id, method=scope["method"], path=request.logged_path,
                traceback=traceback.format_exc(),
            )  # fmt: skip
            answer = (service.fault if service else compute_fault)(unexpected())
        headers = [(b"x-openstack-request-id", request_id.encode())]
        if service is not None and service.extra_request_id is not None:
            headers.append((service.extra_request_id, headers[0][1]))
        headers += request.answer_headers
        numbers.request_answered(
            service.name if service else "none", scope["method"], answer.status, time.perf_counter() - began
        )
        await _send(answer, headers, scope["method"], send)

    async def _websocket(self, websocket: WebSocket, scope: Scope) -> None:
        handler = next((one.handler for one in self._websockets if one.matches(websocket.path)), None)
        try:
            _check_bounds(scope)
            if handler is None:
                raise RouteNotFound()
            await handler(websocket)
        except InstarError as error:
            await _end_websocket(websocket, error.status, error.message)
        except Exception:  # the edge of a connection, as above; the query is left out, it may hold a token
            log.error("http.unexpected", path=websocket.path, traceback=traceback.format_exc())
            await _end_websocket(websocket, 500, unexpected().message)

    def _mount(self, raw_path: str) -> tuple[Service | None, Router | None, str]:
        first, slash, rest = raw_path[1:].partition("/")
        mount = self._mounts.get(first)
        return (mount[0], mount[1], slash + rest) if mount else (None, None, raw_path)

    async def _answer(
        self, request: Request, request_id: str, service: Service | None, router: Router | None, below: str
    ) -> Answer:
        _check_bounds(request.scope)
        if service is None or router is None:
            return await self._health.answer(request.path) or self._root(request)
        if service.negotiate is not None:
            service.negotiate(request)
        route, request.params = router.find(request.method, below)
        rule = service.policy[route.policy]
        if rule.needs_token:
            request.context = await self._authenticate(request, request_id)
            if not rule.allows(request.context):
                raise Forbidden(action=route.policy)
        else:
            request.context = _anonymous(request, request_id)
        return await route.handler(request)

    async def _authenticate(self, request: Request, request_id: str) -> RequestContext:
        token = request.header(b"x-auth-token")
        if not token or len(token) > TOKEN_MAX_BYTES:
            raise Unauthorized()
        who = await self._identity.authenticate_token(token)
        return RequestContext(
            request_id=request_id,
            user_id=who.user_id,
            user_name=who.user_name,
            project_id=who.project_id,
            project_name=who.project_name,
            roles=who.roles,
            user_domain_id=who.user_domain_id,
            project_domain_id=who.project_domain_id,
            domain_id=who.domain_id,
            is_system=who.is_system,
            global_request_id=_global_request_id(request),
        )

    def _fault(self, request: Request, service: Service | None, error: InstarError) -> Answer:
        if error.status >= 500:
            log.error(
                "http.failed", method=request.method, path=request.logged_path,
                error=type(error).__name__, message=error.message, cause=repr(error.__cause__)[:500],
            )  # fmt: skip
        answer = (service.fault if service else compute_fault)(describe(error))
        headers: list[Header] = list(answer.headers)
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", f'Keystone uri="{self._identity_uri(request)}"'.encode()))
        elif isinstance(error, MethodNotAllowed):
            headers.append((b"allow", ", ".join(error.allowed).encode()))
        elif isinstance(error, TooLarge | ClientGone | UriTooLong | TooManyHeaders):
            headers.append((b"connection", b"close"))  # nobody reads the rest of that body
        if "retry_after_s" in error.facts:
            headers.append((b"retry-after", str(max(1, round(error.facts["retry_after_s"]))).encode()))
        return answer._replace(headers=headers)

    def _identity_uri(self, request: Request) -> str:
        try:
            return request.origin + self._identity_path
        except InstarError:
            return self._identity_path

    def _root(self, request: Request) -> Answer:
        """`GET /`: where each service is, for people and for whoever has only the port."""
        if request.path != "/":
            raise RouteNotFound()
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(method=request.method, allowed=["GET", "HEAD"])
        services = [
            {"name": one.name, "type": one.catalog_type, "href": f"{request.origin}{one.prefix}/"}
            for one in self.services
        ]
        return json_answer({"services": services})


async def _end_websocket(websocket: WebSocket, status: int, message: str) -> None:
    if websocket.answered:
        await websocket.close(1011, message)
    else:
        await websocket.refuse(status, message)


def _check_bounds(scope: Scope) -> None:
    if len(scope["raw_path"]) + len(scope["query_string"]) > URL_MAX_BYTES:
        raise UriTooLong(limit=URL_MAX_BYTES)
    headers = scope["headers"]
    if len(headers) > HEADERS_MAX:
        raise TooManyHeaders(limit=HEADERS_MAX)
    if sum([len(name) + len(value) for name, value in headers]) > HEADER_BYTES_MAX:
        raise TooManyHeaders(limit=f"{HEADER_BYTES_MAX} bytes")


def _global_request_id(request: Request) -> str:
    """The id that the caller follows a request by; only a well-formed one gets into our logs."""
    given = request.header(b"x-openstack-global-request-id") or request.header(b"x-openstack-request-id")
    return given if given and _GLOBAL_REQUEST_ID.fullmatch(given) else ""


def _anonymous(request: Request, request_id: str) -> RequestContext:
    return RequestContext(
        request_id=request_id, user_id="", user_name="", project_id="", project_name="", roles=_ANONYMOUS,
        global_request_id=_global_request_id(request),
    )  # fmt: skip


async def _send(answer: Answer, headers: list[Header], method: str, send: Send) -> None:
    headers += answer.headers
    if answer.content_type:
        headers.append((b"content-type", answer.content_type))
    if answer.stream is not None:
        await _send_stream(answer, headers, method, send)
        return
    if answer.body or answer.status not in (204, 304):
        headers.append((b"content-length", str(len(answer.body)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else answer.body})


async def _send_stream(answer: Answer, headers: list[Header], method: str, send: Send) -> None:
    assert answer.stream is not None
    if answer.length_bytes is not None:
        headers.append((b"content-length", str(answer.length_bytes).encode()))
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if method != "HEAD":
            async for chunk in answer.stream:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        close = getattr(answer.stream, "aclose", None)
        if close is not None:
            await close()
