"""noVNC's files over HTTP: what is installed and nothing else, with headers that keep the page's token to itself."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from instar.config import ConsoleSettings
from instar.consoles.novnc import novnc_dir
from instar.consoles.service import console_service
from instar.errors import Unauthorized
from instar.http.app import build_app
from instar.http.server import HttpServer
from instar.model.context import Authenticated


class Nobody:
    async def authenticate_token(self, token: str) -> Authenticated:
        raise Unauthorized()


async def _serving(directory: Path) -> tuple[HttpServer, str]:
    app = build_app([console_service(ConsoleSettings(novnc_dir=str(directory)))], Nobody(), body_max_bytes=1024)
    server = HttpServer(app, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{await server.start()}"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A folder like noVNC's: with a link inside, a link to the outside, and what is not for browsers."""
    (tmp_path / "secret.js").write_text("outside")
    page = tmp_path / "novnc"
    (page / "core" / "deep").mkdir(parents=True)
    (page / "vnc.html").write_text("<html>")
    (page / "vnc_auto.html").symlink_to("vnc.html")
    (page / "core" / "rfb.js").write_text("export default 1")
    (page / "core" / "deep" / "out.js").symlink_to(tmp_path / "secret.js")
    (page / "core" / "launch.sh").write_text("#!/bin/sh")
    server, url = await _serving(page)
    async with httpx.AsyncClient(base_url=url) as made:
        yield made
    await server.stop(grace_s=1)


@pytest.mark.parametrize("name", ["vnc.html", "vnc_auto.html", "core/rfb.js"])
async def test_files_are_served_with_their_type(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/console/novnc/{name}?path=%3Ftoken%3Dx")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/javascript" if name.endswith(".js") else "text/html")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert re.search(r"script-src 'self';", policy)
    assert (answer.headers["cache-control"] == "no-store") is name.endswith(".html")


@pytest.mark.parametrize(
    "name",
    [
        "", "core", "core/", "core/launch.sh", "core/deep/out.js", "../secret.js", "%2e%2e/secret.js", "..%2fsecret.js",
        "core/../vnc.html", "core%2frfb.js/x", "vnc.html/", "a/b/c/d/e/f/g/h.js", "vnc.html%00.js", "//etc/passwd",
    ],
)  # fmt: skip
async def test_nothing_else_can_be_asked_for(client: httpx.AsyncClient, name: str) -> None:
    # Over a socket of our own: a client would tidy the path up first.
    request = client.build_request("GET", "/console/novnc/x")
    host, port = request.url.host, request.url.port
    with socket.create_connection((host, port or 80), timeout=10) as raw:
        raw.sendall(f"GET /console/novnc/{name} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = await _read_all(raw)
    status = int(answer.split(b" ", 2)[1])
    assert status == (200 if name == "vnc.html/" else 404), answer
    assert b"outside" not in answer


async def _read_all(raw: socket.socket) -> bytes:
    loop, answer = asyncio.get_running_loop(), b""
    raw.setblocking(False)
    while piece := await loop.sock_recv(raw, 65_536):
        answer += piece
    return answer


async def test_where_it_is_not_installed_a_sentence_says_so(tmp_path: Path) -> None:
    server, url = await _serving(tmp_path / "nothing")
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/console/novnc/vnc.html")
    await server.stop(grace_s=1)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/plain")
    assert "noVNC is not installed" in answer.text and "novnc" in answer.text


async def test_the_installed_page_and_all_that_it_loads_are_served() -> None:
    """noVNC as make install brings it: each script that one of its files imports can be had."""
    directory = novnc_dir(ConsoleSettings())
    if directory is None:
        pytest.skip("noVNC is not installed")
    server, url = await _serving(directory)
    loaded: set[str] = set()
    async with httpx.AsyncClient(base_url=f"{url}/console/novnc/") as client:
        page = await client.get("vnc.html")
        assert not re.search(r"<script(?![^>]*\bsrc=)", page.text), "a script in the page would need 'unsafe-inline'"
        wanted = set(re.findall(r'(?:src|href)="([^":#]+)"', page.text))
        while wanted:
            name = wanted.pop()
            loaded.add(name)
            answer = await client.get(name)
            assert answer.status_code == 200, name
            if name.endswith(".js"):
                imported = re.findall(r"^(?:import|export)[^;]*?from ['\"](\.[^'\"]+)['\"]", answer.text, re.MULTILINE)
                base = httpx.URL(f"http://x/{name}")
                wanted |= {base.join(one).path.lstrip("/") for one in imported} - loaded
    await server.stop(grace_s=1)
    assert "core/rfb.js" in loaded and "vendor/pako/lib/zlib/inflate.js" in loaded
