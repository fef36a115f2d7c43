"""What the control plane adds to each operation: simulated hosts take no time, so all of it is ours."""

from __future__ import annotations

import statistics
import time
from typing import Any

from bench.http_client import Connection
from bench.process import cloud
from bench.refs import build, gone, reach, refs_of
from bench.table import Row

TURNS = 40
POLL_S = 0.001


async def operations() -> list[Row]:
    """Medians of request → settled, one at a time."""
    times: dict[str, list[float]] = {}
    async with cloud() as one:
        connection = one.connect()
        refs = await refs_of(connection)
        for turn in range(TURNS):
            built = await build(connection, refs, f"operations-{turn}", POLL_S)
            times.setdefault("create", []).append(built.active_s)
            for name, action, status in (
                ("reboot hard", {"reboot": {"type": "HARD"}}, "ACTIVE"),
                ("reboot soft", {"reboot": {"type": "SOFT"}}, "ACTIVE"),
                ("stop", {"os-stop": None}, "SHUTOFF"),
                ("start", {"os-start": None}, "ACTIVE"),
            ):
                times.setdefault(name, []).append(await _act(connection, built.id, action, status))
            times.setdefault("delete", []).append(await _delete(connection, built.id))
        await connection.close()
    return [Row(f"{name}, median of {TURNS}", statistics.median(took) * 1000, "ms") for name, took in times.items()]


async def _act(connection: Connection, server_id: str, action: dict[str, Any], status: str) -> float:
    began = time.perf_counter()
    await connection.json("POST", f"/compute/v2.1/servers/{server_id}/action", action, expect=202)
    await reach(connection, server_id, status, POLL_S)
    return time.perf_counter() - began


async def _delete(connection: Connection, server_id: str) -> float:
    began = time.perf_counter()
    await connection.json("DELETE", f"/compute/v2.1/servers/{server_id}", expect=204)
    await gone(connection, server_id, POLL_S)
    return time.perf_counter() - began
