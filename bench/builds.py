"""Builds, one after another and by many clients at once: the same measurement for every kind of cloud."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from bench.http_client import Connection
from bench.refs import Refs, build

CLIENTS = 16
WARM_UP = 20
POLL_ONE_S = 0.001
POLL_MANY_S = 0.02  # a client that asks more often measures its own questions
POLL_AS_USERS_S = 0.1  # still ten times as often as users' programs ask, which wait a second and longer


class OneByOne(NamedTuple):
    """Medians, in ms from the request on."""

    accepted_ms: float
    active_ms: float


async def one_by_one(connection: Connection, refs: Refs, count: int) -> OneByOne:
    for number in range(WARM_UP):
        await build(connection, refs, f"warm-{number}", POLL_ONE_S)
    built = [await build(connection, refs, f"one-{number}", POLL_ONE_S) for number in range(count)]
    return OneByOne(
        statistics.median(one.accepted_s for one in built) * 1000, statistics.median(one.active_s for one in built) * 1000
    )


class Rate(NamedTuple):
    per_second: float
    failed: int


async def in_parallel(
    connect: Callable[[], Connection], refs: Refs, name: str, count: int, *, poll_s: float = POLL_MANY_S
) -> Rate:
    """So many builds by CLIENTS clients, each of which waits for its server before it asks for the next."""
    numbers = iter(range(count))
    failed = 0

    async def client() -> None:
        nonlocal failed
        connection = connect()
        for number in numbers:
            try:
                await build(connection, refs, f"{name}-{number}", poll_s)
            except (RuntimeError, TimeoutError) as error:
                print(f"{name}-{number}: {error}")
                failed += 1
        await connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return Rate((count - failed) / (time.perf_counter() - began), failed)
