"""Kill -9 in the middle of many operations: how long until everything is settled, and whether anything is lost."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.http_client import Connection
from bench.process import cloud
from bench.refs import Refs, build, refs_of
from bench.table import Row

BUILDS = 20  # half of what is in flight; the other half are hard reboots of servers that run
SPAWN_S = 1.0
SETTLE_DEADLINE_S = 120.0


async def recovery() -> list[Row]:
    """Builds and reboots on hosts that take a second for each; the process is killed while they run, and started again."""
    async with cloud(environ={"INSTAR_SIMULATED_SPAWN_S": str(SPAWN_S)}) as one:
        connection = one.connect()
        refs = await refs_of(connection)
        running = await asyncio.gather(*(_build(one.connect(), refs, f"runs-{number}") for number in range(BUILDS)))
        for number, server_id in enumerate(running):
            await connection.json("POST", "/compute/v2.1/servers", refs.body(f"crash-{number}"), expect=202)
            reboot = {"reboot": {"type": "HARD"}}
            await connection.json("POST", f"/compute/v2.1/servers/{server_id}/action", reboot, expect=202)
        await asyncio.sleep(SPAWN_S / 2)
        in_flight = sum(server["OS-EXT-STS:task_state"] is not None for server in await _servers(connection))
        await connection.close()
        await one.kill()
        killed = time.perf_counter()
        answered = await one.start()
        connection = one.connect()
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while True:
                servers = await _servers(connection)
                if all(server["OS-EXT-STS:task_state"] is None for server in servers):
                    break
                await asyncio.sleep(0.02)
        settled = time.perf_counter() - killed
        active = sum(server["status"] == "ACTIVE" for server in servers)
        findings = (await connection.json("GET", "/instar/v1/audit"))["findings"]
        await connection.close()
    return [
        Row("operations in flight at kill -9 (builds and hard reboots)", in_flight, "", at_least=2 * BUILDS),
        Row("restart to first answer", answered, "s"),
        Row("restart to all settled (each works a second on its host)", settled, "s", at_most=10),
        Row("servers that are ACTIVE afterwards", active, "", at_least=2 * BUILDS),
        Row("findings of the audit afterwards", len(findings), "", at_most=0),
    ]


async def _build(connection: Connection, refs: Refs, name: str) -> str:
    built = await build(connection, refs, name, 0.1)
    await connection.close()
    return built.id


async def _servers(connection: Connection) -> list[dict[str, Any]]:
    servers: list[dict[str, Any]] = (await connection.json("GET", "/compute/v2.1/servers/detail"))["servers"]
    return servers
