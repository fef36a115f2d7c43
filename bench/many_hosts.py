"""Ten thousand simulated hosts that only report: what they cost each process of the control plane, how long one build takes
among them, and how soon each process ends that is told to.

`INSTAR_BENCH_HOSTS`, `INSTAR_BENCH_HEARTBEAT_S` and `INSTAR_BENCH_REST_S` measure others (10,000 hosts, the cloud's own
heartbeat, 45 s between their start and the measurement)."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from bench.distributed import Distributed, distributed_cloud
from bench.refs import build
from bench.table import Row

PROCESSES = 2
WATCHED_S = 20.0
WARM_UP, BUILDS = 3, 12
POLL_S = 0.005
STOPPED_MAX_S = 5.0


async def many_hosts() -> list[Row]:
    hosts = int(os.environ.get("INSTAR_BENCH_HOSTS", "10000"))
    heartbeat_s = float(os.environ.get("INSTAR_BENCH_HEARTBEAT_S", "0"))
    rest_s = float(os.environ.get("INSTAR_BENCH_REST_S", "45"))
    host = {"heartbeat_s": heartbeat_s, "down_after_s": heartbeat_s * 4, "lost_after_s": heartbeat_s * 6}
    settings = {"host": host} if heartbeat_s else {}
    began = time.perf_counter()
    async with distributed_cloud(hosts=hosts, agents=PROCESSES, settings=settings) as one:
        up_s = time.perf_counter() - began
        started = one.cpu_s()
        await asyncio.sleep(rest_s)  # each host is looked at once when it comes
        before, bytes_before, watched_from = one.cpu_s(), _loopback_bytes(), time.perf_counter()
        await asyncio.sleep(WATCHED_S)
        after, watched_s = one.cpu_s(), time.perf_counter() - watched_from
        rate = (_loopback_bytes() - bytes_before) / watched_s / (1 << 20)
        took_ms = await _builds(one)
        memory = {name: _resident_mib(one, name) for name in before}
        stopped = await _stop(one)
    return [
        Row(f"start until {hosts:,} hosts are up", up_s, "s"),
        *(Row(f"CPU of {name} until then", spent_s, "s") for name, spent_s in started.items()),
        *(Row(f"CPU of {name}", (after[name] - before[name]) / watched_s * 100, "% of a core") for name in before),
        Row("CPU of all", sum(after[name] - before[name] for name in before) / watched_s * 100, "% of a core"),
        Row("on the wire, all processes together", rate, "MiB/s"),
        Row("POST /servers → ACTIVE among them, median", sorted(took_ms)[len(took_ms) // 2], "ms", at_most=100),
        Row("POST /servers → ACTIVE among them, longest", max(took_ms), "ms"),
        *(Row(f"resident memory of {name}", memory[name], "MiB") for name in before if name.startswith(("api", "cond"))),
        *(Row(f"{name} ends when told to", took_s, "s", at_most=STOPPED_MAX_S) for name, took_s in stopped.items()),
    ]


async def _builds(one: Distributed) -> list[float]:
    """From the request to ACTIVE, of builds one after another."""
    refs, _ = await one.refs()
    connection = one.connect()
    built = [await build(connection, refs, f"one-{number}", POLL_S) for number in range(WARM_UP + BUILDS)]
    await connection.close()
    return [took.active_s * 1000 for took in built[WARM_UP:]]


async def _stop(one: Distributed) -> dict[str, float]:
    """How long each API and conductor takes to end."""
    took: dict[str, float] = {}
    for name in one.cloud.names:
        if name.startswith(("api-", "conductor-")):
            began = time.perf_counter()
            await asyncio.to_thread(one.cloud.processes.stop, name)
            took[name] = time.perf_counter() - began
    return took


def _resident_mib(one: Distributed, name: str) -> float:
    pid = one.cloud.processes.pid(name)
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _loopback_bytes() -> int:
    """Everything that went over loopback so far."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())
