"""The control plane's own numbers, on simulated hosts that take no time."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from bench.http_client import Connection
from bench.process import Cloud, cloud
from bench.table import Row

ONE_BY_ONE = 100
IN_PARALLEL = 600
CLIENTS = 16
LISTED = 1000
READS = 6000
POLL_S = 0.004
BUILD_DEADLINE_S = 60.0


class Refs:
    """What every build names."""

    def __init__(self, image: str, flavor: str, network: str) -> None:
        self.image, self.flavor, self.network = image, flavor, network

    def body(self, name: str) -> dict[str, Any]:
        return {
            "server": {
                "name": name, "imageRef": self.image, "flavorRef": self.flavor,
                "networks": [{"uuid": self.network}],
            }
        }  # fmt: skip


async def refs_of(connection: Connection) -> Refs:
    images = (await connection.json("GET", "/image/v2/images?name=tiny"))["images"]
    flavors = (await connection.json("GET", "/compute/v2.1/flavors/detail"))["flavors"]
    networks = (await connection.json("GET", "/network/v2.0/networks?name=private"))["networks"]
    smallest = min(flavors, key=lambda flavor: flavor["ram"])
    return Refs(images[0]["id"], smallest["id"], networks[0]["id"])


async def build(connection: Connection, refs: Refs, name: str, poll_s: float) -> tuple[str, float, float]:
    """(id, seconds to 202, seconds to ACTIVE). Raises RuntimeError when the server ends in ERROR."""
    began = time.perf_counter()
    answer = await connection.json("POST", "/compute/v2.1/servers", refs.body(name), expect=202)
    accepted = time.perf_counter() - began
    server_id = answer["server"]["id"]
    async with asyncio.timeout(BUILD_DEADLINE_S):
        while True:
            server = (await connection.json("GET", f"/compute/v2.1/servers/{server_id}"))["server"]
            if server["status"] == "ACTIVE":
                return server_id, accepted, time.perf_counter() - began
            if server["status"] == "ERROR":
                raise RuntimeError(server["fault"]["message"])
            await asyncio.sleep(poll_s)


async def control_plane() -> list[Row]:
    rows = []
    async with cloud() as one:
        connection = one.connect()
        refs = await refs_of(connection)
        rows += await _one_by_one(connection, refs)
        rows += await _in_parallel(one, refs)
        rows += await _lists(one, connection)
        rows.append(Row("memory of the process, 1,000 servers", one.resident_mib, "MiB", at_most=150))
        await connection.close()
        await one.stop()
        rows.append(Row("start-up to first answer, 1,000 servers", await one.start(), "s", at_most=1.5))
    return rows


async def _one_by_one(connection: Connection, refs: Refs) -> list[Row]:
    timings = [await build(connection, refs, f"one-{number}", 0) for number in range(ONE_BY_ONE)]
    accepted = statistics.median(timing[1] for timing in timings) * 1000
    active = statistics.median(timing[2] for timing in timings) * 1000
    return [
        Row("POST /servers → 202, median", accepted, "ms", at_most=5),
        Row("POST /servers → ACTIVE, median", active, "ms", at_most=20),
    ]


async def _in_parallel(one: Cloud, refs: Refs) -> list[Row]:
    names = iter(range(IN_PARALLEL))
    failed = 0

    async def client() -> None:
        nonlocal failed
        connection = one.connect()
        for number in names:
            try:
                await build(connection, refs, f"many-{number}", POLL_S)
            except (RuntimeError, TimeoutError):
                failed += 1
        await connection.close()

    cpu, began = one.cpu_s, time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    took = time.perf_counter() - began
    return [
        Row(f"builds per second, {CLIENTS} clients", (IN_PARALLEL - failed) / took, "/s", at_least=100),
        Row("builds that failed", failed, "", at_most=0),
        Row("CPU of one build, clients' polls included", (one.cpu_s - cpu) / IN_PARALLEL * 1000, "ms"),
    ]


async def _lists(one: Cloud, connection: Connection) -> list[Row]:
    refs = await refs_of(connection)
    listed = len((await connection.json("GET", f"/compute/v2.1/servers?limit={LISTED}"))["servers"])
    ids = [(await build(connection, refs, f"more-{number}", 0))[0] for number in range(max(1, LISTED - listed))]
    took = []
    for _ in range(9):
        began = time.perf_counter()
        status, _ = await connection.request("GET", f"/compute/v2.1/servers/detail?limit={LISTED}")
        took.append((time.perf_counter() - began) * 1000)
        assert status == 200
    path = f"/compute/v2.1/servers/{ids[0]}"

    async def reader() -> None:
        mine = one.connect()
        for _ in range(READS // CLIENTS):
            await mine.request("GET", path)
        await mine.close()

    began = time.perf_counter()
    await asyncio.gather(*(reader() for _ in range(CLIENTS)))
    return [
        Row("GET /servers/detail of 1,000 servers, median", statistics.median(took), "ms", at_most=40),
        Row("GET /servers/{id}", READS / (time.perf_counter() - began), "/s", at_least=2000),
    ]
