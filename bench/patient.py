"""A client that knows that a cloud may be away for a while: it asks again until it knows what became of its request.

Used where processes are killed under load. A request whose answer was lost may have been accepted: before it is sent again
the record is read, as a careful user's program would do.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from bench.http_client import Connection

ANSWER_MAX_S = 10.0  # an answer that takes longer is taken for lost
PAUSE_S = 0.2
SERVERS = "/compute/v2.1/servers"
AWAY = (OSError, EOFError, TimeoutError)  # refused, reset, ended in the middle (IncompleteReadError is an EOFError)
NOT_NOW = (502, 503, 504)


class GaveUp(Exception):
    """The cloud did not do in time what was asked; the text says what it did."""


class Patient:
    """One client with one connection, made again when it is lost. `retries` counts the requests that were sent again."""

    def __init__(self, connect: Callable[[], Connection], *, patience_s: float) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._patience_s = patience_s
        self.retries = 0

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def once(self, method: str, path: str, body: Any = None) -> tuple[int, Any] | None:
        """(status, decoded body), or None where nobody can say whether the request was worked on, or it was not."""
        if self._connection is None:
            self._connection = self._connect()
        try:
            async with asyncio.timeout(ANSWER_MAX_S):
                status, answer = await self._connection.request(method, path, body)
        except AWAY:
            await self.close()
            return None
        if status in NOT_NOW:
            return None
        return status, json.loads(answer) if answer.startswith((b"{", b"[")) else None

    async def until(self, ask: Callable[[], Awaitable[Any]], what: str) -> Any:
        """What `ask` returns as soon as that is not None. Raises GaveUp."""
        deadline = time.monotonic() + self._patience_s
        while (answer := await ask()) is None:
            if time.monotonic() > deadline:
                raise GaveUp(f"{what}: no answer for {self._patience_s:g} s")
            self.retries += 1
            await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.5))
        return answer

    async def get(self, path: str) -> tuple[int, Any]:
        async def ask() -> tuple[int, Any] | None:
            return await self.once("GET", path)

        found: tuple[int, Any] = await self.until(ask, f"GET {path}")
        return found

    async def server(self, server_id: str) -> dict[str, Any] | None:
        """The server, or None when there is none."""
        status, answer = await self.get(f"{SERVERS}/{server_id}")
        return answer["server"] if status == 200 else None

    async def create(self, name: str, body: dict[str, Any]) -> str:
        """The id of the server of this name (which nobody else uses), made exactly once. Raises GaveUp."""

        async def ask() -> str | None:
            answer = await self.once("POST", SERVERS, body)
            if answer is not None:
                if answer[0] != 202:
                    raise GaveUp(f"create {name}: {answer}")
                return str(answer[1]["server"]["id"])
            _, found = await self.get(f"{SERVERS}?name=^{name}$")
            return str(found["servers"][0]["id"]) if found["servers"] else None

        server_id: str = await self.until(ask, f"create {name}")
        return server_id

    async def act(self, server_id: str, action: str, body: dict[str, Any], *, before: int) -> bool:
        """Ask for the action until it stands in the server's record more often than the `before` times it did; then True.
        False when it was refused as impossible now (409)."""

        async def ask() -> bool | None:
            answer = await self.once("POST", f"{SERVERS}/{server_id}/action", body)
            if answer is not None and answer[0] < 300:
                return True
            if answer is not None and answer[0] not in (404, 409):
                raise GaveUp(f"{action} {server_id}: {answer}")
            if await self.times(server_id, action) > before:
                return True
            return None if answer is None else False

        done: bool = await self.until(ask, f"{action} {server_id}")
        return done

    async def times(self, server_id: str, action: str) -> int:
        """How often the action stands in the server's record."""
        status, found = await self.get(f"{SERVERS}/{server_id}/os-instance-actions")
        return sum(one["action"] == action for one in found["instanceActions"]) if status == 200 else 0

    async def delete(self, server_id: str) -> None:
        """The server is being deleted, or gone."""

        async def ask() -> bool | None:
            answer = await self.once("DELETE", f"{SERVERS}/{server_id}")
            return True if answer is not None and answer[0] in (204, 404, 409) else None

        await self.until(ask, f"delete {server_id}")

    async def settled(self, server_id: str, *, poll_s: float = 0.25) -> dict[str, Any] | None:
        """The server once it has no task (None: it is gone). Raises GaveUp."""
        deadline = time.monotonic() + self._patience_s
        while True:
            server = await self.server(server_id)
            if server is None or server["OS-EXT-STS:task_state"] is None:
                return server
            if time.monotonic() > deadline:
                raise GaveUp(
                    f"{server['name']} ({server_id}) stays {server['status']}, {server['OS-EXT-STS:task_state']} "
                    f"for {self._patience_s:g} s"
                )
            await asyncio.sleep(poll_s)
