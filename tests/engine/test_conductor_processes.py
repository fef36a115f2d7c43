"""Conductors as processes on PostgreSQL that are killed, stopped for longer than their lease and continued, and ended: what
they had is taken over in time, and no step of an operation is done by two at once.

INSTAR_TEST_LEASE_S=6 INSTAR_TEST_STOPPED_S=60 tells the same story with the lease of a real cloud, stopped for a minute;
INSTAR_TEST_BUS=rabbitmq tells it over a broker, which gives to others what a stopped one holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

import pytest

from instar.agent.agent import Agent
from instar.agent.fence import Fence
from instar.bus.memory import MemoryBus
from instar.bus.opening import bus_of
from instar.bus.socket_server import BusServer
from instar.cli.services import Services
from instar.cli.state_dir import StateDir
from instar.http.context import RequestContext
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.lifecycle.audit import audit
from instar.lifecycle.new_records import NewInstance
from instar.model.instance import Instance, InstanceSpec, SpecImage
from instar.model.network import RequestedNetwork
from instar.model.states import VmState
from instar.store.conductors import conductors_fetch, keeper_fetch
from instar.store.flavors import bootstrap_flavors, flavor_fetch
from instar.store.instances import instance_fetch
from instar.store.operations import operations_unfinished
from instar.store.postgresql import PostgresqlStore
from tests.engine.conductor_process import settings_of
from tests.patience import slowness
from tests.postgresql_server import PATIENT
from tests.rabbitmq_server import ensure_bus

LEASE_S = float(os.environ.get("INSTAR_TEST_LEASE_S", "2"))
STOPPED_S = float(os.environ.get("INSTAR_TEST_STOPPED_S", "4"))  # longer than the lease
DEADLINE_S = 120.0
TAKEN_WITHIN_S = LEASE_S * 7 / 6 + 15  # an idle machine needs less than one second besides the lease's time
ROOT = Path(__file__).parents[2]


class Watched:
    """Does the work of a host while `go` is set, and notes where two commands for one instance were worked on at once."""

    def __init__(self, host: Any, go: asyncio.Event) -> None:
        self._host, self._go = host, go
        self.overlaps: list[str] = []
        self.starts: Counter[str] = Counter()
        self._running: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._host, name)
        if name not in ("ensure_running", "ensure_disk", "ensure_ports", "ensure_absent", "ensure_no_disks"):
            return work

        async def watched(*arguments: Any, **named: Any) -> Any:
            instance_id = str(getattr(arguments[0], "instance_id", arguments[0]))
            self._running[instance_id] += 1
            if self._running[instance_id] > 1:
                self.overlaps.append(f"{name} {instance_id}")
            try:
                await self._go.wait()
                return await work(*arguments, **named)
            finally:
                self._running[instance_id] -= 1

        return watched


class Bench:
    """Database, bus and hosts in this process; conductors in theirs."""

    def __init__(self, directory: Path, database: str) -> None:
        self.directory, self.database = directory, database
        self.state = StateDir(directory)
        settings = settings_of(LEASE_S, directory)
        self.store, self.bus = PostgresqlStore(database, PATIENT), bus_of(settings, name="bench")
        self.server = BusServer(self.bus, self.state.bus_socket) if isinstance(self.bus, MemoryBus) else None
        self.services = Services(self.state, settings, self.store, self.bus, storage_patience_s=None)
        self.world = SimulatedWorld(None, settings.simulated)
        self.go = asyncio.Event()
        self.go.set()
        self.hosts = {
            f"sim-{n}": Watched(self.world.host(f"sim-{n}"), self.go) for n in range(settings.simulated.hosts)
        }
        self.agent = Agent(self.hosts, self.bus, Fence(None), settings.host, boot_id=lambda: "boot-1")  # type: ignore[arg-type]
        self.processes: list[subprocess.Popen[str]] = []

    async def open(self, image_file: Path) -> None:
        await asyncio.to_thread(ensure_bus, self.directory)
        await self.store.open()
        await bootstrap_flavors(self.store)
        await self.bus.open()
        if self.server is not None:
            await self.server.open()
        await self.services.open()
        await self.agent.open()
        await self.services.images.register("tiny", image_file, disk_format="raw", properties={})
        await self.services.networks.bootstrap("10.78.0.0/22")

    async def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            await asyncio.to_thread(process.communicate)
        for opened in (self.agent, self.services, self.server, self.bus, self.store):
            if opened is not None:
                await opened.close()
        self.world.close()

    async def conductor(self) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "tests.engine.conductor_process", str(self.directory), self.database, str(LEASE_S)]
        log = (self.directory / f"conductor-{len(self.processes)}.log").open("w+")
        process = await asyncio.to_thread(_start, argv, log)
        log.close()
        self.processes.append(process)
        await self.until("a conductor is ready", lambda: self.said(process, "ready "))
        return process

    async def said(self, process: subprocess.Popen[str], text: str) -> str | None:
        assert process.poll() is None, self.log_of(process)
        lines = [line for line in self.log_of(process).splitlines() if text in line]
        return lines[-1] if lines else None

    def log_of(self, process: subprocess.Popen[str]) -> str:
        return (self.directory / f"conductor-{self.processes.index(process)}.log").read_text()

    async def id_of(self, process: subprocess.Popen[str]) -> str:
        """What it calls itself now: one that was too slow for its lease has another name than before."""
        return str(await self.said(process, "ready ")).split()[-1]

    async def both_work(self, count: int, *processes: subprocess.Popen[str]) -> list[Instance]:
        """So many are being built, by both, and none of them is ready before `go` is set again: no host begins anything."""
        self.go.clear()
        made = await self.create(count)

        async def have_some() -> bool:
            owners = await self.owners()
            return all([owners[await self.id_of(one)] > 2 for one in processes])

        await self.until("both conductors work", have_some)
        return made

    async def keeps(self, process: subprocess.Popen[str]) -> bool:
        return await keeper_fetch(self.store) == await self.id_of(process)

    async def taken_over(self, conductor_id: str) -> None:
        """What this one had is another's, not much later than the lease allows."""
        took_s = await self.until("another one takes over", lambda: nobody_has(self, conductor_id))
        print(f"taken over after {took_s:.1f} s of a lease of {LEASE_S} s")
        assert took_s <= TAKEN_WITHIN_S * slowness()

    async def create(self, count: int) -> list[Instance]:
        rows = await self.store.read("SELECT id FROM images")
        image = await self.services.images.image_fetch(rows[0]["id"], project_id="demo", is_admin=True)
        network = (await self.store.read("SELECT id FROM networks"))[0]["id"]
        spec = InstanceSpec(
            flavor=await flavor_fetch(self.store, "1", visible_to=None),
            image=SpecImage(image.id, image.name, virtual_size_bytes=image.virtual_size_bytes),
            networks=(RequestedNetwork(network_id=network),),
        )
        context = RequestContext(
            request_id=f"req-{uuid.uuid4()}", user_id="user", user_name="user", project_id="demo", project_name="demo",
            roles=frozenset({"member", "reader"}),
        )  # fmt: skip
        return await self.services.lifecycle.create(context, [NewInstance(f"g{n}", f"g{n}", spec) for n in range(count)])

    async def owners(self) -> Counter[str | None]:
        return Counter(operation.owner for operation in await operations_unfinished(self.store))

    async def until(self, what: str, happened: Callable[[], Awaitable[object]]) -> float:
        """Seconds until it has happened."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not await happened():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logs = "\n".join(self.log_of(one)[-3000:] for one in self.processes)
            raise TimeoutError(f"not within {DEADLINE_S} s: {what}; {await self.owners()}\n{logs}") from None
        return time.monotonic() - began

    async def settled(self) -> bool:
        return not await operations_unfinished(self.store)

    async def check(self, made: list[Instance]) -> None:
        ended = [await instance_fetch(self.store, instance.id) for instance in made]
        assert {(one.vm_state, one.task_state, one.facts.fault) for one in ended} == {(VmState.ACTIVE, None, None)}
        where: dict[str, str] = {}
        for name in self.hosts:
            for instance_id in (await self.world.host(name).census()).guests:
                assert instance_id not in where, f"{instance_id} is on {where.get(instance_id)} and {name}"
                where[instance_id] = name
        assert where == {one.id: one.host for one in ended}
        assert [overlap for host in self.hosts.values() for overlap in host.overlaps] == []
        addresses = [ip.ip_address for one in ended for port in one.facts.ports for ip in port.definition.fixed_ips]
        assert len(set(addresses)) == len(made)
        assert await audit(self.services.cloud, list(self.hosts)) == []


@pytest.fixture
async def bench(tmp_path: Path, postgresql_url: str) -> AsyncIterator[Bench]:
    image_file = tmp_path / "disk.raw"
    image_file.write_bytes(bytes(1 << 20))
    made = Bench(tmp_path / "cloud", postgresql_url)
    try:
        await made.open(image_file)
        yield made
    finally:
        await made.close()


async def test_conductors_that_are_stopped_killed_and_ended_lose_nothing_and_do_no_harm(bench: Bench) -> None:
    """One story, since each process takes its time to start: share, SIGSTOP and SIGCONT, kill -9, SIGTERM."""
    first, second = await bench.conductor(), await bench.conductor()
    await bench.until("one keeps", lambda: either_keeps(bench, first, second))

    # One is stopped in the middle, for longer than its lease: the other takes over, also what is done once for all.
    made = await bench.both_work(40, first, second)
    stopped_id = await bench.id_of(first)
    first.send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert (await bench.owners())[stopped_id] > 0
    bench.go.set()
    await bench.taken_over(stopped_id)
    await bench.until("all is built", bench.settled)
    await bench.until("the other one keeps", lambda: bench.keeps(second))
    await asyncio.sleep(max(0.0, STOPPED_S - (time.monotonic() - stopped_at)))
    await bench.check(made)

    # It goes on: notices before it does anything, does no harm, registers anew, and works.
    assert await bench.said(first, f'"conductor": "{stopped_id}", "operations"') is None, "it noticed before it went on"
    first.send_signal(signal.SIGCONT)
    await bench.until("it noticed", lambda: bench.said(first, f'"conductor": "{stopped_id}", "operations"'))
    await bench.until("it is registered anew", lambda: registered(bench, first, second))
    assert stopped_id not in await conductors_fetch(bench.store)
    await bench.check(made)

    # The keeper is killed: within the lease's time and a little the other has everything.
    made += await bench.both_work(24, first, second)
    killed_id = await bench.id_of(second)
    second.kill()
    bench.go.set()
    await bench.taken_over(killed_id)
    await bench.until("it keeps again", lambda: bench.keeps(first))
    await bench.until("all is built", bench.settled)
    await bench.check(made)

    # One that ends cleanly hands over at once.
    third = await bench.conductor()
    made += await bench.both_work(24, first, third)
    ended_id = await bench.id_of(first)
    first.terminate()
    assert await asyncio.to_thread(first.wait, DEADLINE_S) == 0
    assert ended_id not in await conductors_fetch(bench.store), "it went without a word"
    assert await nobody_has(bench, ended_id)
    bench.go.set()
    await bench.until("the third one keeps", lambda: bench.keeps(third))
    await bench.until("all is built", bench.settled)
    await bench.check(made)


def _start(argv: list[str], log: TextIO) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


async def nobody_has(bench: Bench, conductor_id: str) -> bool:
    return (await bench.owners())[conductor_id] == 0


async def either_keeps(bench: Bench, *processes: subprocess.Popen[str]) -> bool:
    return any([await bench.keeps(one) for one in processes])


async def registered(bench: Bench, *processes: subprocess.Popen[str]) -> bool:
    return set(await conductors_fetch(bench.store)) == {await bench.id_of(one) for one in processes}
