"""A small keep-alive HTTP client for load: one connection, one request at a time, nothing parsed that is not needed.

Load comes from the same two cores as the cloud, so what the client costs is taken from what is measured."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit


class Connection:
    """One connection to the cloud with the headers of one user."""

    def __init__(self, url: str, token: str = "", *, microversion: str = "") -> None:
        """`microversion` of the Compute API, such as 2.95; the oldest without."""
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._headers = f"host: {parts.netloc}\r\n"
        if token:
            self._headers += f"x-auth-token: {token}\r\n"
        if microversion:
            self._headers += f"openstack-api-version: compute {microversion}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.answer_headers: dict[str, str] = {}

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """(status, body) of one request; a body of bytes is sent as it is."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=1 << 24)
        reader, writer = self._streams
        if isinstance(body, bytes):
            payload, kind = body, "application/octet-stream"
        else:
            payload, kind = b"" if body is None else json.dumps(body).encode(), "application/json"
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}"
        if payload:
            head += f"content-type: {kind}\r\ncontent-length: {len(payload)}\r\n"
        writer.write(head.encode() + b"\r\n" + payload)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        self.answer_headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:]) if name
        }
        length = int(self.answer_headers.get("content-length", "0"))
        return status, await reader.readexactly(length) if length else b""

    async def json(self, method: str, path: str, body: Any = None, *, expect: int = 200) -> Any:
        status, answer = await self.request(method, path, body)
        if status != expect:
            raise RuntimeError(f"{method} {path}: {status} instead of {expect}: {answer[:300]!r}")
        return json.loads(answer) if answer else None

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def token_of(url: str, cloud: dict[str, Any]) -> tuple[str, str]:
    """(token, project id) of a cloud of clouds.yaml."""
    auth = cloud["auth"]
    connection = Connection(url)
    body = {
        "auth": {
            "identity": {
                "methods": ["password"],
                "password": {
                    "user": {
                        "name": auth["username"],
                        "domain": {"name": auth.get("user_domain_name", "Default")},
                        "password": auth["password"],
                    }
                },
            },
            "scope": {
                "project": {
                    "name": auth["project_name"],
                    "domain": {"name": auth.get("project_domain_name", "Default")},
                }
            },
        }
    }
    answer = await connection.json("POST", "/identity/v3/auth/tokens", body, expect=201)
    token = connection.answer_headers["x-subject-token"]
    await connection.close()
    return token, answer["token"]["project"]["id"]
