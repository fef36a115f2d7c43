"""From a WebSocket with a token to the guest's screen or serial line, by way of its host's streams. Any API process can.

Nothing is interpreted: bytes go both ways, and each side waits for the other. A console ends when the guest ends it, the
client leaves, nothing moves for long, or (a serial line has one listener) when somebody else opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

import structlog

from instar.config import ConsoleSettings
from instar.errors import Forbidden, NotFound, OperationError, Unavailable
from instar.http.websocket import WebSocket
from instar.lifecycle.consoles import Consoles
from instar.model.console import ConsoleKind
from instar.model.stream import StreamAddress
from instar.store.console_tokens import ConsoleAccess

log = structlog.get_logger()

READ_BYTES = 65_536
OPEN_DEADLINE_S = 30.0
CLOSE_DEADLINE_S = 5.0
RETRY_S = 5
SUBPROTOCOL = "binary"
DONE, FAILED = 1000, 1011  # codes of RFC 6455 and its registry


class Connector(Protocol):
    """The streams of hosts, as a client sees them: `streams.StreamClient`."""

    @property
    def address(self) -> StreamAddress: ...

    async def connect(self, peer: StreamAddress, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OperationError."""
        ...


class ConsoleProxy:
    """`serve` is the handler of the WebSockets. `base_url` is where browsers are told to come from, if that is set."""

    def __init__(self, consoles: Consoles, streams: Connector, settings: ConsoleSettings, *, base_url: str = "") -> None:
        self._consoles = consoles
        self._streams = streams
        self._settings = settings
        allowed = (*settings.allowed_origins, *([base_url] if base_url else []))
        self._origins = frozenset(_origin(one) for one in allowed)
        self._open = 0
        self._serial: dict[str, asyncio.Event] = {}  # instance id → set when another one takes its serial line

    async def serve(self, websocket: WebSocket) -> None:
        self._check_origin(websocket)
        token = _token(websocket)
        if not token:
            raise NotFound("The URL of a console has a token.")
        if self._open >= self._settings.connections_max:
            raise Unavailable(retry_after_s=RETRY_S)
        self._open += 1
        try:
            await self._serve(websocket, token)
        finally:
            self._open -= 1

    def _check_origin(self, websocket: WebSocket) -> None:
        """Browsers say whose page opens the socket; it must be ours. Others than browsers say nothing."""
        origin = websocket.header(b"origin")
        if not origin:
            return
        given = _origin(origin)
        if given in self._origins or (given[1] and given[1] == websocket.header(b"host").lower()):
            return
        raise Forbidden("The page that opens this console is of another site.")

    async def _serve(self, websocket: WebSocket, token: str) -> None:
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S):
                access, offer = await self._consoles.open(token, self._streams.address)
                reader, writer = await self._streams.connect(offer.address, offer.name)
        except (OperationError, OSError, TimeoutError) as error:
            raise Unavailable(retry_after_s=RETRY_S) from error
        log.info("console.opened", instance=access.instance_id, kind=access.kind)
        reason = "failed"
        try:
            await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in websocket.subprotocols else None)
            with self._only_listener(access) as taken_over:
                code, reason = await self._join(websocket, reader, writer, taken_over)
            await websocket.close(code, reason)
        except OSError:
            reason = "the client is gone"
        finally:
            log.info("console.closed", instance=access.instance_id, kind=access.kind, reason=reason)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_DEADLINE_S):
                    await writer.wait_closed()

    @contextlib.contextmanager
    def _only_listener(self, access: ConsoleAccess) -> Iterator[asyncio.Event]:
        """The event is set when another one opens the same serial line: the guest's side of it hears one at a time, and a
        session that somebody left open must not lock the owner out."""
        mine = asyncio.Event()
        if access.kind != ConsoleKind.SERIAL:
            yield mine
            return
        if (before := self._serial.get(access.instance_id)) is not None:
            before.set()
        self._serial[access.instance_id] = mine
        try:
            yield mine
        finally:
            if self._serial.get(access.instance_id) is mine:
                del self._serial[access.instance_id]

    async def _join(
        self, websocket: WebSocket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, taken_over: asyncio.Event
    ) -> tuple[int, str]:
        """Bytes both ways until one side ends. Returns the code and the reason for the client."""
        idle = asyncio.timeout(self._settings.idle_s)

        def moved() -> None:
            idle.reschedule(asyncio.get_running_loop().time() + self._settings.idle_s)

        sides: dict[asyncio.Task[object], tuple[int, str]] = {}
        try:
            async with idle:
                sides = {
                    asyncio.create_task(_from_guest(reader, websocket, moved)): (DONE, "the guest ended the console"),
                    asyncio.create_task(_to_guest(websocket, writer, moved)): (DONE, "closed"),
                    asyncio.create_task(taken_over.wait()): (DONE, "another one has opened this serial console"),
                }
                done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            return DONE, "nothing has moved for too long"
        finally:
            for task in sides:
                task.cancel()
            await asyncio.gather(*sides, return_exceptions=True)
        ended = next(iter(done))
        if isinstance(error := ended.exception(), OperationError | OSError):
            return FAILED, "the console is lost"
        if error is not None:
            raise error
        return sides[ended]


async def _from_guest(reader: asyncio.StreamReader, websocket: WebSocket, moved: Callable[[], None]) -> None:
    while data := await reader.read(READ_BYTES):
        await websocket.send(data)  # a client that reads slowly makes the guest wait, not us remember
        moved()


async def _to_guest(websocket: WebSocket, writer: asyncio.StreamWriter, moved: Callable[[], None]) -> None:
    while (data := await websocket.receive()) is not None:
        if writer.is_closing():  # uvloop would raise RuntimeError
            raise ConnectionResetError("the guest's side is gone")
        writer.write(data)
        await writer.drain()
        moved()


def _token(websocket: WebSocket) -> str:
    """`?token=…`, or as noVNC's page was given it: `?path=?token=…`."""
    if token := websocket.query_one("token"):
        return token
    nested = urlsplit(websocket.query_one("path")).query
    return dict(parse_qsl(nested, max_num_fields=10)).get("token", "") if nested.count("&") < 10 else ""


def _origin(url: str) -> tuple[str, str]:
    """(scheme, host with port) in lower case; the port of the scheme is left out, as browsers do."""
    try:
        parts = urlsplit(url.lower())
    except ValueError:
        return "", ""
    default = {"http": ":80", "https": ":443"}.get(parts.scheme, ":")
    return parts.scheme, parts.netloc.removesuffix(default)
