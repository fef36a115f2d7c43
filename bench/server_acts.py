"""What a client does with one server, timed: from the request to its answer, and to the state in which it settles."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from bench.http_client import Connection
from bench.refs import gone, reach

MICROVERSION = "2.94"  # later ones leave an evacuated server stopped


class Act(NamedTuple):
    """`POST /servers/{id}/action` with `body` is answered by `answers`; the server ends with `status` and no task."""

    name: str
    body: dict[str, Any]
    status: str
    answers: int = 202


class Took(NamedTuple):
    """Seconds from the request on."""

    accepted_s: float
    settled_s: float


async def act(connection: Connection, server_id: str, one: Act, poll_s: float, *, look_after_s: float = 0.0) -> Took:
    """`look_after_s` from the request on nothing is asked: what is asked every few milliseconds takes from the processors
    that do the work."""

    async def settled() -> None:
        await reach(connection, server_id, one.status, poll_s)

    path = f"/compute/v2.1/servers/{server_id}/action"
    return await timed(connection, "POST", path, one.body, one.answers, settled, look_after_s=look_after_s)


async def delete(connection: Connection, server_id: str, poll_s: float, *, look_after_s: float = 0.0) -> Took:
    async def settled() -> None:
        await gone(connection, server_id, poll_s)

    path = f"/compute/v2.1/servers/{server_id}"
    return await timed(connection, "DELETE", path, None, 204, settled, look_after_s=look_after_s)


async def timed(
    connection: Connection,
    method: str,
    path: str,
    body: Any,
    answers: int,
    settled: Callable[[], Awaitable[None]],
    *,
    look_after_s: float = 0.0,
) -> Took:
    """One request, and then whatever `settled` waits for, `look_after_s` from the beginning at the earliest."""
    began = time.perf_counter()
    await connection.json(method, path, body, expect=answers)
    accepted = time.perf_counter() - began
    await asyncio.sleep(max(0.0, look_after_s - accepted))
    await settled()
    return Took(accepted, time.perf_counter() - began)


async def remove_snapshots(connection: Connection, server_id: str) -> None:
    """The images that were made of the server are gone."""
    images = (await connection.json("GET", f"/image/v2/images?instance_uuid={server_id}"))["images"]
    for image in images:
        await connection.json("DELETE", f"/image/v2/images/{image['id']}", expect=204)
