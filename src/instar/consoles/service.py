"""What the program mounts for consoles: noVNC's files below `/console`, and the WebSockets.

Called by the program: `console_service(settings)` and `console_websockets(proxy)` go to `http.build_app`.
"""

from __future__ import annotations

from instar.config import ConsoleSettings
from instar.consoles.novnc import SEGMENTS_MAX, NovncPages, novnc_dir
from instar.consoles.proxy import ConsoleProxy
from instar.http.answer import Answer
from instar.http.app import Service
from instar.http.faults import Fault
from instar.http.policy import OPEN, Policy
from instar.http.routing import Route
from instar.http.websocket import WebSocketRoute

PREFIX = "/console"
POLICY = Policy({"console:pages": OPEN})


def console_service(settings: ConsoleSettings) -> Service:
    """noVNC's own page, unmodified; the token in its URL is for the WebSocket, so the files are for anybody. Blocking:
    looks which files there are."""
    pages = NovncPages(novnc_dir(settings))
    paths = ["/novnc" + "".join(f"/{{s{number}}}" for number in range(depth)) for depth in range(1, SEGMENTS_MAX + 1)]
    return Service(
        name="console",
        catalog_type="console",
        prefix=PREFIX,
        routes=[Route("GET", path, "console:pages", pages.get) for path in paths],
        policy=POLICY,
        fault=plain_fault,
    )


def console_websockets(proxy: ConsoleProxy) -> list[WebSocketRoute]:
    """`/?token=…` is what serial clients use; noVNC puts its path behind the host's address or, where it is newer, behind
    its page's."""
    return [WebSocketRoute("/", proxy.serve), WebSocketRoute("*/console/websocket", proxy.serve)]


def plain_fault(fault: Fault) -> Answer:
    """A sentence for people: what a browser shows."""
    return Answer(fault.status, f"{fault.message}\n".encode(), b"text/plain; charset=utf-8")
