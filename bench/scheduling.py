"""Choosing a host among 10,000: the scheduler and its host table as a conductor has them, fed with reports."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import msgspec

from bench.table import Row
from instar.config import Settings
from instar.model.guest import HostInventory
from instar.model.host import HostReport
from instar.model.instance import Flavor
from instar.scheduling.host_table import HostTable
from instar.scheduling.scheduler import Scheduler, SchedulingRequest
from instar.store.sqlite import SqliteStore

HOSTS = 10_000
TURNS = 50
SMALL = Flavor(id="small", name="small", vcpus=1, memory_mib=4096, root_gib=10)
LAST = "h09999"
ARCHITECTURES = ("x86_64", "aarch64")  # most hosts have the first, the last one has the second


async def scheduling() -> list[Row]:
    """Medians of one selection; and what 10,000 hosts' reports cost the event loop."""
    # Reports come from here alone, and nothing is measured that a host would have to be up for in time.
    settings = Settings()
    settings = msgspec.structs.replace(settings, host=msgspec.structs.replace(settings.host, down_after_s=3600.0))
    with tempfile.TemporaryDirectory(prefix="instar-bench-") as directory:
        store = SqliteStore(Path(directory) / "instar.db")
        await store.open()
        try:
            table = HostTable(store, settings)
            scheduler = Scheduler(store, table, settings)
            _hear_all(table)
            await table.persist()
            return [
                await _select(scheduler, "most hosts fit, asked best first", _request(ARCHITECTURES[0])),
                await _select(scheduler, "one host fits, every host asked", _request(ARCHITECTURES[1])),
                await _claim(scheduler),
                _reports(table),
            ]
        finally:
            await store.close()


async def _select(scheduler: Scheduler, name: str, request: SchedulingRequest) -> Row:
    took = []
    for _ in range(TURNS):
        began = time.perf_counter()
        selection = await scheduler.candidates(request)
        took.append((time.perf_counter() - began) * 1000)
        if not selection.hosts:
            raise RuntimeError("no host was selected")
        await asyncio.sleep(0)
    return Row(f"selection of {HOSTS:,}: {name}, median", statistics.median(took), "ms", at_most=5)


async def _claim(scheduler: Scheduler) -> Row:
    took = []
    for turn in range(TURNS):
        began = time.perf_counter()
        await scheduler.claim(f"claim-{turn}", f"instance-{turn}", LAST, Flavor("tiny", "tiny", 1, 1, 0))
        took.append((time.perf_counter() - began) * 1000)
    return Row("claim on the one that was selected, median", statistics.median(took), "ms")


def _reports(table: HostTable) -> Row:
    began = time.perf_counter()
    _hear_all(table)
    return Row(f"{HOSTS:,} heartbeats taken in", (time.perf_counter() - began) * 1000, "ms")


def _hear_all(table: HostTable) -> None:
    for number in range(HOSTS):
        name = f"h{number:05}"
        inventory = HostInventory(
            vcpus=64, memory_mib=262_144 + number % 97, disk_gib=4096, hypervisor_type="simulated", hypervisor_version=1,
            hypervisor_hostname=name, virt_type="simulated", cpu_arch=ARCHITECTURES[name == LAST],
        )  # fmt: skip
        table.hear(HostReport(name, "boot", "agent", True, inventory))


def _request(architecture: str) -> SchedulingRequest:
    return SchedulingRequest("instance", "project", SMALL, {"hw_architecture": architecture})
