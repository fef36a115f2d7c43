"""Sixteen clients work on their servers while processes are killed and started again at random.

What a client and a killer do follows from the seed alone; when it is done follows from the machine. Afterwards everything
is started, and each operation that was accepted must have come to an end: to its goal, or back with a fault. None may stay.
"""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.crash import Victim
from bench.http_client import Connection
from bench.patient import GaveUp, Patient
from bench.refs import Refs

CLIENTS = 16
SERVERS_OF_A_CLIENT = 3
PATIENCE_S = 150.0
BETWEEN_KILLS_S = (3.0, 12.0)
AWAY_S = (0.5, 5.0)

# What may be asked of a server in this status: action, body, the status that it ends with.
CHOICES: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "ACTIVE": (
        ("resize", None, "VERIFY_RESIZE"), ("shelve", None, "SHELVED_OFFLOADED"),
        ("reboot", {"type": "HARD"}, "ACTIVE"), ("reboot", {"type": "SOFT"}, "ACTIVE"),
    ),
    "VERIFY_RESIZE": (("confirmResize", None, "ACTIVE"), ("revertResize", None, "ACTIVE")),
    "SHELVED_OFFLOADED": (("unshelve", None, "ACTIVE"),),
}  # fmt: skip
DELETE_SHARE = 0.12  # of all that is done to a server


RESULTS = ("done", "undone", "refused", "stuck")


class Outcome(NamedTuple):
    """`result`: one of RESULTS; undone is back as it was, with a fault."""

    action: str
    result: str
    took_s: float
    detail: str = ""


class ChaosRun(NamedTuple):
    seed: int
    outcomes: list[Outcome]
    kills: collections.Counter[str]
    retries: int

    def count(self, result: str) -> int:
        return sum(one.result == result for one in self.outcomes)

    @property
    def longest(self) -> Outcome:
        return max(self.outcomes, key=lambda one: one.took_s)


async def chaos_run(
    connect: Callable[[], Connection], refs: Refs, flavors: tuple[str, str], victims: Sequence[Victim], *,
    seed: int, last_s: float,
) -> ChaosRun:  # fmt: skip
    """`flavors`: a small and a larger one. Returns when every client has ended its last operation."""
    ends_at = time.monotonic() + last_s
    outcomes: list[Outcome] = []
    kills: collections.Counter[str] = collections.Counter()
    clients = [_Client(connect, refs, flavors, number, seed, outcomes) for number in range(CLIENTS)]
    async with asyncio.TaskGroup() as group:
        group.create_task(_kill_at_random(victims, random.Random(seed), ends_at, kills))
        for client in clients:
            group.create_task(client.work(ends_at))
    return ChaosRun(seed, outcomes, kills, sum(client.patient.retries for client in clients))


def rounds(victims: Sequence[Victim], chance: random.Random) -> Iterator[Victim]:
    """For ever one of each kind in turn, another order each time: a run of two minutes has had them all. A kind is a
    name without its number: conductor-1 and conductor-2 are of one kind."""
    kinds: dict[str, list[Victim]] = collections.defaultdict(list)
    for victim in victims:
        kinds[victim.name.rstrip("0123456789").rstrip("-")].append(victim)
    while True:
        for kind in chance.sample(sorted(kinds), len(kinds)):
            yield chance.choice(kinds[kind])


async def _kill_at_random(
    victims: Sequence[Victim], chance: random.Random, ends_at: float, kills: collections.Counter[str]
) -> None:
    for victim in rounds(victims, chance):
        await asyncio.sleep(chance.uniform(*BETWEEN_KILLS_S))
        away_s = chance.uniform(*AWAY_S)
        if time.monotonic() + away_s > ends_at or victim.kill is None or victim.start is None:
            return
        await victim.kill()
        kills[victim.name] += 1
        await asyncio.sleep(away_s)
        await victim.start()


class _Client:
    def __init__(
        self, connect: Callable[[], Connection], refs: Refs, flavors: tuple[str, str], number: int, seed: int,
        outcomes: list[Outcome],
    ) -> None:  # fmt: skip
        self.patient = Patient(connect, patience_s=PATIENCE_S)
        self._refs, self._flavors, self._number, self._outcomes = refs, flavors, number, outcomes
        self._chance = random.Random(f"{seed} {number}")
        self._prefix = f"chaos-{seed}-{number}"
        self._made = 0
        self._larger: set[str] = set()  # servers that have the larger flavor

    async def work(self, ends_at: float) -> None:
        servers: list[str] = []
        while time.monotonic() < ends_at:
            began, action = time.monotonic(), "create"
            try:
                if len(servers) < SERVERS_OF_A_CLIENT:
                    result, detail = await self._create(servers)
                else:
                    action, result, detail = await self._act(self._chance.choice(servers), servers)
            except GaveUp as stuck:
                result, detail = "stuck", str(stuck)
            self._outcomes.append(Outcome(action, result, time.monotonic() - began, detail))
            if result == "stuck":
                break
        await self.patient.close()

    async def _create(self, servers: list[str]) -> tuple[str, str]:
        self._made += 1
        name = f"{self._prefix}-{self._made}"
        server_id = await self.patient.create(name, self._refs.body(name))
        server = await self.patient.settled(server_id)
        if server is not None and server["status"] == "ACTIVE":
            servers.append(server_id)
            return "done", ""
        await self.patient.delete(server_id)
        return "undone", f"create: {_why(server)}"

    async def _act(self, server_id: str, servers: list[str]) -> tuple[str, str, str]:
        server = await self.patient.settled(server_id)
        choices = CHOICES.get(server["status"]) if server is not None else None
        if not choices or self._chance.random() < DELETE_SHARE:
            servers.remove(server_id)
            await self.patient.delete(server_id)
            left = await self.patient.settled(server_id)
            return "delete", "done" if left is None else "undone", "" if left is None else f"delete: {_why(left)}"
        action, body, ends = self._chance.choice(choices)
        if action == "resize":
            body = {"flavorRef": self._flavors[server_id not in self._larger]}
        before = await self.patient.times(server_id, action)
        if not await self.patient.act(server_id, action, {action: body}, before=before):
            return action, "refused", ""
        return action, *await self._ended(server_id, action, ends)

    async def _ended(self, server_id: str, action: str, ends: str) -> tuple[str, str]:
        server = await self.patient.settled(server_id)
        # Two pairs of operations follow each other without a word from us: a confirm has no task, offloading has its own.
        deadline = time.monotonic() + PATIENCE_S
        between = {"VERIFY_RESIZE"} if action == "confirmResize" else {"SHELVED"} if action == "shelve" else set()
        while server is not None and server["status"] in between and time.monotonic() < deadline:
            if "fault" in server and action == "confirmResize":
                break
            await asyncio.sleep(0.25)
            server = await self.patient.settled(server_id)
        if server is None or server["status"] != ends:
            return "undone", f"{action}: {_why(server)}"
        if action == "confirmResize":
            self._larger ^= {server_id}
        return "done", ""


def _why(server: dict[str, Any] | None) -> str:
    if server is None:
        return "the server is gone"
    return f"{server['status']}: {server.get('fault', {}).get('message', 'without a fault')}"
