"""The control plane's own numbers, on simulated hosts that take no time."""

from __future__ import annotations

import asyncio
import statistics
import time

from bench.builds import CLIENTS, POLL_MANY_S, POLL_ONE_S, in_parallel, one_by_one
from bench.http_client import Connection
from bench.process import Cloud, cloud
from bench.refs import Refs, build, refs_of
from bench.table import Row

ONE_BY_ONE = 200
IN_PARALLEL = 800
ROUNDS = 3
LISTED = 1000
READS = 8000
LISTS = 15
STARTS = 3


async def control_plane() -> list[Row]:
    """Everything that a user of the API waits for, and what the process costs."""
    async with cloud() as one:
        connection = one.connect()
        refs = await refs_of(connection)
        rows = await _one_by_one(connection, refs)
        ids = await _until_listed(connection, refs)
        rows += await _lists(one, connection, ids)
        rows.append(Row("resident memory with 1,000 servers", one.resident_mib, "MB", at_most=150))
        await connection.close()
        rows += await _start_ups(one)
        rows += await _in_parallel(one, refs)
    return rows


async def _one_by_one(connection: Connection, refs: Refs) -> list[Row]:
    took = await one_by_one(connection, refs, ONE_BY_ONE)
    return [
        Row("POST /servers → 202, median", took.accepted_ms, "ms", at_most=5),
        Row("POST /servers → ACTIVE, median", took.active_ms, "ms", at_most=20),
    ]


async def _until_listed(connection: Connection, refs: Refs) -> list[str]:
    """Ids of LISTED servers."""
    listed = await connection.json("GET", f"/compute/v2.1/servers?limit={LISTED}")
    ids = [server["id"] for server in listed["servers"]]
    return ids + [(await build(connection, refs, f"more-{n}", POLL_ONE_S)).id for n in range(LISTED - len(ids))]


async def _in_parallel(one: Cloud, refs: Refs) -> list[Row]:
    """ROUNDS times the same, because other work on the machine takes its share: the best and the median are told."""
    rates, failed, cpu = [], 0, one.cpu_s
    for turn in range(ROUNDS):
        rate = await in_parallel(one.connect, refs, f"many-{turn}", IN_PARALLEL)
        rates.append(rate.per_second)
        failed += rate.failed
    cpu_ms = (one.cpu_s - cpu) / (IN_PARALLEL * ROUNDS) * 1000
    return [
        Row(f"builds per second, {CLIENTS} clients, best of {ROUNDS}", max(rates), "/s", at_least=100),
        Row(f"builds per second, {CLIENTS} clients, median of {ROUNDS}", statistics.median(rates), "/s", at_least=100),
        Row("builds that failed", failed, "", at_most=0),
        Row(f"CPU per build, with polls each {POLL_MANY_S * 1000:g} ms", cpu_ms, "ms"),
    ]


async def _lists(one: Cloud, connection: Connection, ids: list[str]) -> list[Row]:
    took = []
    for _ in range(LISTS):
        began = time.perf_counter()
        status, _ = await connection.request("GET", f"/compute/v2.1/servers/detail?limit={LISTED}")
        took.append((time.perf_counter() - began) * 1000)
        if status != 200:
            raise RuntimeError(f"GET /servers/detail: {status}")
    rates = [await _read_one(one, ids) for _ in range(ROUNDS)]
    return [
        Row("GET /servers/detail of 1,000 servers, best", min(took), "ms", at_most=40),
        Row("GET /servers/detail of 1,000 servers, median", statistics.median(took), "ms", at_most=40),
        Row(f"GET /servers/{{id}}, best of {ROUNDS}", max(rates), "/s", at_least=2000),
        Row(f"GET /servers/{{id}}, median of {ROUNDS}", statistics.median(rates), "/s", at_least=2000),
    ]


async def _read_one(one: Cloud, ids: list[str]) -> float:
    """Reads of single servers per second, by CLIENTS clients."""
    paths = iter([f"/compute/v2.1/servers/{ids[number % len(ids)]}" for number in range(READS)])

    async def reader() -> None:
        mine = one.connect()
        for path in paths:
            status, _ = await mine.request("GET", path)
            if status != 200:
                raise RuntimeError(f"GET {path}: {status}")
        await mine.close()

    began = time.perf_counter()
    await asyncio.gather(*(reader() for _ in range(CLIENTS)))
    return READS / (time.perf_counter() - began)


async def _start_ups(one: Cloud) -> list[Row]:
    times = []
    for _ in range(STARTS):
        await one.stop()
        times.append(await one.start())
    return [
        Row("start-up to first answer, a new cloud", one.first_start_s, "s", at_most=1.5),
        Row(f"start-up to first answer, 1,000 servers, best of {STARTS}", min(times), "s", at_most=1.5),
        Row(f"start-up to first answer, 1,000 servers, median of {STARTS}", statistics.median(times), "s", at_most=1.5),
    ]
