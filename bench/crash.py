"""40 builds, 40 shelves and 40 resizes by 16 clients, and one process killed with -9 in the middle of them.

The same test that other clouds were put to: hosts that take 3 s for a spawn, a destroy, a snapshot and each half of a
migration; 10 s in, the process is killed, and started again 3 s later. Counted is what came to the end that was asked for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from bench.http_client import Connection
from bench.patient import GaveUp, Patient
from bench.refs import Refs

OF_EACH = 40
CLIENTS = 16
KILL_AFTER_S = 10.0
AWAY_S = 3.0
PATIENCE_S = 120.0
SLOW = {"spawn_s": 3.0, "destroy_s": 3.0, "snapshot_s": 3.0, "move_s": 3.0}  # settings of simulated hosts
ENDS = {"build": "ACTIVE", "shelve": "SHELVED_OFFLOADED", "resize": "VERIFY_RESIZE"}


class Victim(NamedTuple):
    """What is killed, and how it comes back. None of both: a run in which nothing is killed."""

    name: str
    kill: Callable[[], Awaitable[None]] | None = None
    start: Callable[[], Awaitable[None]] | None = None


class Done(NamedTuple):
    """One operation: where it ended, and in what time, in seconds since the first one was sent."""

    kind: str
    began_s: float
    ended_s: float
    problem: str


class CrashRun(NamedTuple):
    """`back_s`: when what was killed was back, in seconds since the first operation; all times on this clock."""

    victim: str
    done: list[Done]
    back_s: float

    @property
    def completed(self) -> int:
        return sum(not one.problem for one in self.done)

    @property
    def in_all_s(self) -> float:
        return max(one.ended_s for one in self.done)

    def late_s(self, usual: CrashRun) -> float:
        """By how much operations that were in flight when all was back ended later than their own time allows: counted
        from the return, or from their begin where that was later."""
        usually = {kind: max(one.ended_s - one.began_s for one in usual.done if one.kind == kind) for kind in ENDS}
        hit = [one for one in self.done if one.ended_s > self.back_s - AWAY_S]
        return max((one.ended_s - max(one.began_s, self.back_s) - usually[one.kind] for one in hit), default=0.0)

    @property
    def longest_s(self) -> float:
        return max(one.ended_s - one.began_s for one in self.done)


async def crash_run(connect: Callable[[], Connection], refs: Refs, larger_flavor: str, victim: Victim) -> CrashRun:
    """80 servers are built before; then all operations are sent, mixed, each client one after another."""
    prefix = f"{victim.name.replace(' ', '-')}-{random.getrandbits(24):06x}"
    ready = await _servers(connect, refs, prefix, 2 * OF_EACH)
    jobs = [("shelve", one) for one in ready[:OF_EACH]] + [("resize", one) for one in ready[OF_EACH:]]
    jobs += [("build", f"{prefix}-new-{number}") for number in range(OF_EACH)]
    random.Random(7).shuffle(jobs)
    began = time.monotonic()
    done: list[Done] = []
    back = [0.0]

    async def client(number: int) -> None:
        patient = Patient(connect, patience_s=PATIENCE_S)
        for kind, subject in jobs[number::CLIENTS]:
            started = time.monotonic() - began
            problem = await _do(patient, refs, larger_flavor, kind, subject)
            done.append(Done(kind, started, time.monotonic() - began, problem))
        await patient.close()

    async def killer() -> None:
        if victim.kill is None or victim.start is None:
            return
        await asyncio.sleep(KILL_AFTER_S)
        await victim.kill()
        await asyncio.sleep(AWAY_S)
        await victim.start()
        back[0] = time.monotonic() - began

    async with asyncio.TaskGroup() as group:
        group.create_task(killer())
        for number in range(CLIENTS):
            group.create_task(client(number))
    return CrashRun(victim.name, done, back[0])


async def _do(patient: Patient, refs: Refs, larger_flavor: str, kind: str, subject: str) -> str:
    """What went wrong, or nothing."""
    try:
        if kind == "build":
            server_id = await patient.create(subject, refs.body(subject))
        else:
            server_id = subject
            body: dict[str, Any] = {"shelve": None} if kind == "shelve" else {"resize": {"flavorRef": larger_flavor}}
            if not await patient.act(server_id, kind, body, before=0):
                return f"{kind} was refused"
        return await _ended(patient, server_id, ENDS[kind])
    except GaveUp as problem:
        return str(problem)


async def _ended(patient: Patient, server_id: str, status: str) -> str:
    """Offloading follows a shelve as an operation of its own: the first moment without a task need not be the end."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        server = await patient.settled(server_id)
        if server is None:
            return f"{server_id} is gone"
        if server["status"] == status:
            return ""
        if server["status"] != "SHELVED" or time.monotonic() > deadline:
            return f"{server['name']} ended {server['status']}: {server.get('fault', {}).get('message')}"
        await asyncio.sleep(0.25)


async def _servers(connect: Callable[[], Connection], refs: Refs, prefix: str, count: int) -> list[str]:
    async def some(number: int) -> list[str]:
        patient = Patient(connect, patience_s=PATIENCE_S)
        names = [f"{prefix}-{one}" for one in range(number, count, CLIENTS)]
        ids = [await patient.create(name, refs.body(name)) for name in names]
        for server_id in ids:
            if problem := await _ended(patient, server_id, "ACTIVE"):
                raise RuntimeError(problem)
        await patient.close()
        return ids

    found = await asyncio.gather(*(some(number) for number in range(CLIENTS)))
    return [server_id for ids in found for server_id in ids]


async def remove_all(connect: Callable[[], Connection]) -> None:
    """No server is left in the project."""
    patient = Patient(connect, patience_s=PATIENCE_S)
    while servers := (await patient.get("/compute/v2.1/servers"))[1]["servers"]:
        for server in servers:
            await patient.delete(server["id"])
        await asyncio.sleep(0.5)
    await patient.close()
