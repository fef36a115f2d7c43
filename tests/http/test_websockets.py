"""WebSockets on the same port: routes, refusals, bounds, and sides that are slow or go away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from instar.errors import Forbidden
from instar.http.app import build_app
from instar.http.server import HttpServer
from instar.http.websocket import MESSAGE_MAX_BYTES, WebSocket, WebSocketRoute
from instar.model.context import Authenticated
from tests.patience import PATIENCE_S


class Nobody:
    async def authenticate_token(self, token: str) -> Authenticated:
        raise Forbidden(action="anything")


class Handlers:
    """What the routes lead to, and what was seen there."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.sent_bytes = 0

    async def echo(self, websocket: WebSocket) -> None:
        await websocket.accept("binary" if "binary" in websocket.subprotocols else None)
        while (data := await websocket.receive()) is not None:
            await websocket.send(data)
        self.ended.set()

    async def flood(self, websocket: WebSocket) -> None:
        await websocket.accept()
        with contextlib.suppress(OSError):
            while True:
                await websocket.send(bytes(65_536))
                self.sent_bytes += 65_536
        self.ended.set()

    async def refuse(self, websocket: WebSocket) -> None:
        raise Forbidden("Not you.")

    async def break_down(self, websocket: WebSocket) -> None:
        await websocket.accept()
        raise RuntimeError("nobody foresaw this")


@pytest.fixture
async def handlers() -> Handlers:
    return Handlers()


@pytest.fixture
async def url(handlers: Handlers) -> AsyncIterator[str]:
    routes = [
        WebSocketRoute("/echo", handlers.echo), WebSocketRoute("*/tail/flood", handlers.flood),
        WebSocketRoute("/no", handlers.refuse), WebSocketRoute("/broken", handlers.break_down),
    ]  # fmt: skip
    server = HttpServer(build_app([], Nobody(), body_max_bytes=1024, websockets=routes), "127.0.0.1", 0)
    port = await server.start()
    yield f"ws://127.0.0.1:{port}"
    await server.stop(grace_s=1)


async def refused(url: str, **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as raised:
        await connect(url, **options)
    return raised.value.response.status_code, (raised.value.response.body or b"").decode()


async def test_messages_go_both_ways(url: str) -> None:
    async with connect(f"{url}/echo?token=x", subprotocols=["binary"]) as connection:
        assert connection.subprotocol == "binary"
        for message in (b"\x00\xff", b"", bytes(MESSAGE_MAX_BYTES)):
            await connection.send(message)
            assert await connection.recv() == message
        await connection.send("text")
        assert await connection.recv() == b"text"


async def test_a_path_may_end_in_a_route(url: str) -> None:
    async with connect(f"{url}/any/where/tail/flood", close_timeout=0.1) as connection:
        assert await connection.recv() == bytes(65_536)


async def test_what_is_refused_says_why_with_its_status(url: str) -> None:
    assert await refused(f"{url}/no") == (403, "Not you.")
    assert (await refused(f"{url}/nowhere"))[0] == 404
    assert (await refused(f"{url}/echo?{'x' * 9000}"))[0] == 414
    assert (await refused(f"{url}/echo", additional_headers={f"x-{n}": "1" for n in range(110)}))[0] == 431
    assert (await refused(f"{url}/echo", additional_headers={f"x-{n}": "1" for n in range(150)}))[0] == 431


async def test_a_message_that_is_too_long_ends_the_connection(url: str, handlers: Handlers) -> None:
    async with connect(f"{url}/echo") as connection:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(bytes(MESSAGE_MAX_BYTES + 1))
        with pytest.raises(ConnectionClosed) as closed:
            await connection.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    async with asyncio.timeout(PATIENCE_S):
        await handlers.ended.wait()


async def test_a_failure_of_ours_closes_and_says_nothing_of_the_inside(url: str) -> None:
    async with connect(f"{url}/broken") as connection:
        with pytest.raises(ConnectionClosed) as closed:
            await connection.recv()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011
    assert "foresaw" not in closed.value.rcvd.reason


async def test_a_slow_reader_makes_the_sender_wait(url: str, handlers: Handlers) -> None:
    async with _stalled(f"{url}/tail/flood"):
        before = -1
        async with asyncio.timeout(PATIENCE_S):
            while before != handlers.sent_bytes or not before:
                before = handlers.sent_bytes
                await asyncio.sleep(0.3)
        assert handlers.sent_bytes < 64 << 20
    async with asyncio.timeout(PATIENCE_S):
        await handlers.ended.wait()


async def test_who_answers_no_ping_is_cut_off(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is stuck takes nothing: closing politely would wait for it for ever."""
    monkeypatch.setattr("instar.http.server.PING_EVERY_S", 0.2)
    monkeypatch.setattr("instar.http.server.PONG_WITHIN_S", 0.3)
    app = build_app([], Nobody(), body_max_bytes=1024, websockets=[WebSocketRoute("/flood", handlers.flood)])
    server = HttpServer(app, "127.0.0.1", 0)
    port = await server.start()
    try:
        async with _stalled(f"ws://127.0.0.1:{port}/flood"), asyncio.timeout(PATIENCE_S):
            await handlers.ended.wait()
    finally:
        await server.stop(grace_s=1)


async def test_the_server_stops_with_connections_open(handlers: Handlers) -> None:
    app = build_app([], Nobody(), body_max_bytes=1024, websockets=[WebSocketRoute("/echo", handlers.echo)])
    server = HttpServer(app, "127.0.0.1", 0)
    async with connect(f"ws://127.0.0.1:{await server.start()}/echo") as connection:
        await server.stop(grace_s=2)
        with pytest.raises(ConnectionClosed):
            await connection.recv()
    async with asyncio.timeout(PATIENCE_S):
        await handlers.ended.wait()


async def test_tokens_are_in_no_log(url: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    caplog.set_level(logging.DEBUG, logger="uvicorn.error")
    async with connect(f"{url}/echo?token=secret-1", logger=logging.getLogger("tests.client")):
        pass
    async with connect(f"{url}/broken?token=secret-2", logger=logging.getLogger("tests.client")):
        pass
    assert (await refused(f"{url}/no?token=secret-3", logger=logging.getLogger("tests.client")))[0] == 403
    logged = [record.getMessage() for record in caplog.records if record.name != "tests.client"]
    written = capsys.readouterr()
    assert not any("secret-" in text for text in (*logged, written.out, written.err)), logged


@contextlib.asynccontextmanager
async def _stalled(url: str) -> AsyncIterator[ClientConnection]:
    """A client that takes nothing any more."""
    connection = await connect(url, max_queue=1, ping_interval=None)
    connection.transport.pause_reading()
    try:
        yield connection
    finally:
        connection.transport.abort()
