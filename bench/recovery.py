"""Kill -9 in the middle of many operations: how long until everything is settled, and whether anything is lost."""

from __future__ import annotations

import asyncio
import time

from bench.control_plane import refs_of
from bench.process import cloud
from bench.table import Row

IN_FLIGHT = 40
SPAWN_S = 1.0
SETTLE_DEADLINE_S = 60.0


async def recovery() -> list[Row]:
    """40 builds on hosts that take a second for each; the process is killed while they run, and started again."""
    async with cloud(environ={"INSTAR_SIMULATED_SPAWN_S": str(SPAWN_S)}) as one:
        connection = one.connect()
        refs = await refs_of(connection)
        for number in range(IN_FLIGHT):
            await connection.json("POST", "/compute/v2.1/servers", refs.body(f"crash-{number}"), expect=202)
        await connection.close()
        await asyncio.sleep(SPAWN_S / 2)
        await one.kill()
        restarted = time.perf_counter()
        await one.start()
        connection = one.connect()
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while True:
                listed = await connection.json("GET", "/compute/v2.1/servers/detail?limit=1000")
                servers = [server for server in listed["servers"] if server["name"].startswith("crash-")]
                if all(server["OS-EXT-STS:task_state"] is None for server in servers):
                    break
                await asyncio.sleep(0.05)
        settled = time.perf_counter() - restarted
        active = sum(server["status"] == "ACTIVE" for server in servers)
        findings = (await connection.json("GET", "/instar/v1/audit"))["findings"]
        await connection.close()
    return [
        Row(f"{IN_FLIGHT} builds in flight, kill -9: all settled after the restart", settled, "s", at_most=10),
        Row("of these ACTIVE", active, "", at_least=IN_FLIGHT),
        Row("findings of the audit afterwards", len(findings), "", at_most=0),
    ]
