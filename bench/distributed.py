"""A cloud of many processes under measurement: builds, crashes of each kind of process, chaos.

Everything is private: PostgreSQL, RabbitMQ, two APIs behind one port, two conductors, agents with simulated hosts."""

from __future__ import annotations

import asyncio
import collections
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.builds import CLIENTS, POLL_AS_USERS_S, in_parallel, one_by_one
from bench.chaos import ChaosRun, chaos_run
from bench.crash import KILL_AFTER_S, OF_EACH, SLOW, CrashRun, Victim, crash_run, remove_all
from bench.http_client import Connection, token_of
from bench.pace import fixed_loop_ms
from bench.refs import Refs, refs_of
from bench.table import Row, Sheet
from instar.cli.distributed.layout import Layout
from instar.cli.distributed.local_cloud import LocalCloud

IN_PARALLEL = 600
ROUNDS = 3
ONE_BY_ONE = 100
QUIET_MAX_S = 60.0
ROOM: dict[str, Any] = {
    "quota": {"instances": -1, "cores": -1, "ram": -1},
    "network": {"ports": -1},
    "identity": {"token_lifetime_s": 7200},
}
VICTIMS = ("conductor-1", "simulated-1", "rabbitmq", "postgresql", "api-1")


class Distributed:
    """A running cloud: connections to it, and its processes by their names."""

    def __init__(self, cloud: LocalCloud, token: str) -> None:
        self.cloud, self._token = cloud, token

    def connect(self) -> Connection:
        return Connection(self.cloud.url, self._token)

    def victim(self, name: str) -> Victim:
        async def kill() -> None:
            await asyncio.to_thread(self.cloud.processes.kill, name)

        async def start() -> None:
            await asyncio.to_thread(self.cloud.processes.start, name)

        return Victim(name, kill, start)

    def cpu_s(self) -> dict[str, float]:
        """User and system time so far of each process, with its children and all of a server's processes."""
        processes = self.cloud.processes
        pids = {name: processes.pid(name) for name in processes.names}
        return {name: sum(map(_cpu_s, _tree(pid))) for name, pid in pids.items() if pid is not None}

    async def findings(self) -> list[Any]:
        """What the audit finds when nothing is in flight any more, and operations that stay in flight: after a minute,
        if there is anything."""
        connection = self.connect()
        deadline = time.monotonic() + QUIET_MAX_S
        while True:
            left: list[Any] = (await connection.json("GET", "/instar/v1/operations"))["operations"]
            if not left or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
        while True:  # what was left on a host that was away goes when it is back
            found: list[Any] = (await connection.json("GET", "/instar/v1/audit"))["findings"]
            if not found or time.monotonic() > deadline:
                break
            await asyncio.sleep(1)
        await connection.close()
        return left + found

    async def refs(self) -> tuple[Refs, tuple[str, str]]:
        """What builds name, and the two smallest flavors."""
        connection = self.connect()
        refs = await refs_of(connection)
        flavors = (await connection.json("GET", "/compute/v2.1/flavors/detail"))["flavors"]
        await connection.close()
        small, large = sorted(flavors, key=lambda flavor: flavor["ram"])[:2]
        return refs, (small["id"], large["id"])


@asynccontextmanager
async def distributed_cloud(
    *, hosts: int, agents: int = 2, settings: Mapping[str, Any] | None = None
) -> AsyncIterator[Distributed]:
    """Afterwards nothing of it is left."""
    directory = Path(tempfile.mkdtemp(prefix="instar-bench-"))
    os.chmod(directory, 0o711)  # noqa: PTH101 - at once; PostgreSQL has an account of its own
    layout = Layout(
        libvirt_hosts=0, simulated_hosts=hosts, simulated_processes=agents, restarts=False,
        settings=ROOM | dict(settings or {}),
    )  # fmt: skip
    cloud = LocalCloud(directory, layout, say=lambda _: None)
    try:
        await asyncio.to_thread(cloud.start)
        clouds = yaml.safe_load((directory / "clouds.yaml").read_text())
        token, _ = await token_of(cloud.url, clouds["clouds"]["instar"])
        yield Distributed(cloud, token)
    finally:
        await asyncio.to_thread(cloud.close)
        if keep := os.environ.get("INSTAR_BENCH_LOGS"):  # a directory: what the processes said is kept there
            await asyncio.to_thread(shutil.copytree, directory / "log", keep, dirs_exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


async def distributed() -> list[Row]:
    """Builds through two APIs and two conductors, on PostgreSQL and RabbitMQ, all on this machine."""
    async with distributed_cloud(hosts=20) as one:
        refs, _ = await one.refs()
        connection = one.connect()
        took = await one_by_one(connection, refs, ONE_BY_ONE)
        pace_before = await asyncio.to_thread(fixed_loop_ms)
        before = one.cpu_s()
        rounds = [
            await in_parallel(one.connect, refs, f"many-{turn}", IN_PARALLEL, poll_s=POLL_AS_USERS_S)
            for turn in range(ROUNDS)
        ]
        spent = {name: (now - before[name]) / (ROUNDS * IN_PARALLEL) * 1000 for name, now in one.cpu_s().items()}
        pace_after = await asyncio.to_thread(fixed_loop_ms)
        await connection.close()
        findings = await one.findings()
    rates = [one.per_second for one in rounds]
    shares = collections.Counter[str]()
    for name, cpu_ms in spent.items():
        shares[name.rpartition("-")[0] or name] += cpu_ms  # type: ignore[assignment]
    return [
        Row("POST /servers → 202, median", took.accepted_ms, "ms", at_most=10),
        Row("POST /servers → ACTIVE, median", took.active_ms, "ms", at_most=60),
        Row(f"builds per second, {CLIENTS} clients, best of {ROUNDS}", max(rates), "/s", at_least=60),
        Row(f"builds per second, {CLIENTS} clients, median of {ROUNDS}", statistics.median(rates), "/s", at_least=60),
        Row("builds that failed", sum(one.failed for one in rounds), "", at_most=0),
        *(Row(f"CPU per build: {name}", cpu_ms, "ms") for name, cpu_ms in shares.items()),
        Row("a fixed loop of Python before and after the builds, best", min(pace_before, pace_after), "ms"),
        Row("a fixed loop of Python before and after the builds, worst", max(pace_before, pace_after), "ms"),
        Row("findings of the audit afterwards", len(findings), "", at_most=0),
    ]


async def crashes() -> Sheet:
    """The mixed crash test, once for each kind of process; the run in which nothing is killed tells the work's own time."""
    rows: list[tuple[str, ...]] = []
    async with distributed_cloud(hosts=20, settings={"simulated": SLOW}) as one:
        refs, (_, larger) = await one.refs()
        usual = await crash_run(one.connect, refs, larger, Victim("nothing"))
        rows.append(_crash_row(usual, usual, 0))
        for name in VICTIMS:
            await remove_all(one.connect)
            run = await crash_run(one.connect, refs, larger, one.victim(name))
            rows.append(_crash_row(run, usual, len(await one.findings())))
            for done in run.done:
                if done.problem:
                    print(f"{name}: {done.kind}: {done.problem}")
    return Sheet(
        ("killed with -9", "completed", "all, s", "longest operation, s", "late after the return, s", "audit"), rows,
        (f"{OF_EACH} builds, shelves, resizes each by {CLIENTS} clients; killed after {KILL_AFTER_S:g} s, back 3 s later;",
         "a spawn, a destroy, a snapshot and each half of a migration take 3 s. Late: beyond the longest time of such an",
         "operation in the run without a kill. Budget: 120 of 120, ≤ 10 s late, nothing found by the audit."),
    )  # fmt: skip


def _crash_row(run: CrashRun, usual: CrashRun, findings: int) -> tuple[str, ...]:
    return (
        run.victim, f"{run.completed} of {len(run.done)}", f"{run.in_all_s:.1f}", f"{run.longest_s:.1f}",
        f"{max(0.0, run.late_s(usual)):.1f}", f"{findings} findings",
    )  # fmt: skip


async def chaos(seed: int, last_s: float) -> tuple[ChaosRun, list[Any]]:
    """Random work and random kills; then everything is up again, and the audit looks."""
    quick = dict.fromkeys(SLOW, 0.5)
    async with distributed_cloud(hosts=30, agents=3, settings={"simulated": quick}) as one:
        refs, flavors = await one.refs()
        names = one.cloud.processes.names  # every one of them: PostgreSQL and RabbitMQ, too
        run = await chaos_run(one.connect, refs, flavors, [one.victim(name) for name in names], seed=seed, last_s=last_s)
        return run, await one.findings()


def _tree(pid: int) -> Iterator[int]:
    """The process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from _tree(int(child))


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
