"""Hosts that report, fall silent, restart and change: what the table believes, tells, and writes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from instar.bus.contract import Message
from instar.bus.memory import MemoryBus
from instar.config import HostSettings, Settings
from instar.model.host import HOST_REPORTS, HOST_REPORTS_TOGETHER, HostReports
from instar.scheduling.host_table import TOUCH_EVERY_S, HostChange, HostTable
from instar.store.conductors import keeper_guard
from instar.store.contract import Result, Statement, Store
from instar.store.guard import guard_task
from instar.store.hosts import host_delete, host_set_disabled, host_set_forced_down
from instar.store.sqlite import SqliteStore
from tests.patience import PATIENCE_S

from .clouds import SMALL, Clock, SmallCloud, report


class CountingStore(SqliteStore):
    """Counts transactions and statements."""

    transactions = 0
    statements = 0

    async def write(self, *statements: Statement) -> list[Result]:
        self.transactions += 1
        self.statements += len(statements)
        return await super().write(*statements)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CountingStore]:
    opened = CountingStore(tmp_path / "counting.db", durable=False)
    await opened.open()
    yield opened
    await opened.close()


def watched(table: HostTable) -> list[HostChange]:
    changes: list[HostChange] = []
    table.watch(changes.append)
    return changes


async def rows(store: Store) -> Sequence[Any]:
    return await store.read("SELECT * FROM hosts ORDER BY name")


async def test_a_host_is_up_from_its_report_until_it_is_silent_too_long(cloud: SmallCloud) -> None:
    changes = watched(cloud.table)
    await cloud.report("h1")
    assert cloud.table.is_up("h1")
    cloud.clock.now += 8
    assert cloud.table.is_up("h1")
    cloud.clock.now += 0.1
    assert not cloud.table.is_up("h1")
    cloud.table.sweep()
    cloud.table.sweep()
    await cloud.report("h1")
    assert cloud.table.is_up("h1")
    assert changes == [HostChange("h1", "up"), HostChange("h1", "down"), HostChange("h1", "up")]


async def test_a_host_without_its_hypervisor_is_down_at_once(cloud: SmallCloud) -> None:
    changes = watched(cloud.table)
    await cloud.report("h1")
    await cloud.report("h1", ok=False)
    assert not cloud.table.is_up("h1")
    assert changes == [HostChange("h1", "up"), HostChange("h1", "down")]


async def test_the_wall_clock_has_no_part_in_it(cloud: SmallCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report carries no time, and a jump of our own wall clock by a year moves only what is written for people."""
    changes = watched(cloud.table)
    await cloud.report("h1")
    before = (await rows(cloud.store))[0]["reported_at"]
    year_ns = 365 * 86_400 * 10**9
    real_ns = time.time_ns
    for jump in (year_ns, -year_ns):
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: real_ns() + jump)
        await cloud.report("h1")
        cloud.table.sweep()
        assert cloud.table.is_up("h1")
    monkeypatch.undo()
    await cloud.report("h1")
    assert changes == [HostChange("h1", "up")]
    assert abs((await rows(cloud.store))[0]["reported_at"] - before) < 60_000_000


async def test_a_new_boot_id_is_told_as_a_restart(cloud: SmallCloud) -> None:
    changes = watched(cloud.table)
    await cloud.report("h1", boot="first")
    await cloud.report("h1", boot="first")
    await cloud.report("h1", boot="second")
    assert changes == [HostChange("h1", "up"), HostChange("h1", "restarted")]


async def test_an_admin_forces_a_host_down_and_disables_it(cloud: SmallCloud) -> None:
    await cloud.report("h1", "h2")
    await cloud.store.write(host_set_forced_down("h1", True), host_set_disabled("h2", True, "broken fan"))
    await cloud.table.refresh()
    view = cloud.table.get("h2")
    assert view is not None
    assert (cloud.table.is_up("h1"), view.disabled, view.disabled_reason) == (False, True, "broken fan")


async def test_a_host_whose_inventory_is_not_known_yet_is_no_host(cloud: SmallCloud) -> None:
    await cloud.report("h1", ok=False)
    assert cloud.table.names() == []
    assert await rows(cloud.store) == []


async def test_a_host_keeps_its_ids_and_claims_when_its_inventory_changes(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    before = (await rows(cloud.store))[0]
    await cloud.scheduler.claim("c", await cloud.instance(), "h1", SMALL)
    await cloud.report("h1", vcpus=8)
    after = (await rows(cloud.store))[0]
    assert (after["service_id"], after["hypervisor_id"]) == (before["service_id"], before["hypervisor_id"])
    assert (after["vcpus_capacity"], after["vcpus_claimed"]) == (8 * 16, 1)
    view = cloud.table.get("h1")
    assert view is not None
    assert view.vcpus_free == 8 * 16 - 1


async def test_capacity_is_less_the_reserve_and_times_the_ratio(cloud: SmallCloud) -> None:
    await cloud.report("h1", vcpus=4, memory_mib=8704, disk_gib=101)
    row = (await rows(cloud.store))[0]
    assert (row["vcpus_capacity"], row["memory_capacity_mib"], row["disk_capacity_gib"]) == (64, 8192, 100)


async def test_hosts_of_the_database_are_known_but_not_up_before_they_report(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    await cloud.scheduler.claim("c", await cloud.instance(), "h1", SMALL)
    again = HostTable(cloud.store, cloud.settings, clock=cloud.clock)
    await again.load()
    view = again.get("h1")
    assert view is not None
    assert (again.is_up("h1"), view.vcpus_free, view.instances) == (False, 63, 1)
    again.hear(report("h1"))
    assert again.is_up("h1")


async def test_a_deleted_host_that_still_reports_comes_back_as_a_new_one(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    before = (await rows(cloud.store))[0]["service_id"]
    await cloud.store.write(*host_delete("h1"))
    await cloud.table.refresh()
    assert cloud.table.get("h1") is None
    await cloud.report("h1")
    assert (await rows(cloud.store))[0]["service_id"] != before


async def test_a_thousand_reports_are_a_few_writes(store: CountingStore) -> None:
    clock = Clock()
    table = HostTable(store, Settings(), clock=clock)
    for number in range(1000):
        table.hear(report(f"h{number:04}"))
    await table.persist()
    assert (store.transactions, store.statements) == (2, 1000)
    for _ in range(5):
        for number in range(1000):
            table.hear(report(f"h{number:04}"))
    table.hear(report("h0001", running_vms=7))
    await table.persist()
    assert (store.transactions, store.statements) == (3, 1001), "that the others are still there is not news"
    clock.now += TOUCH_EVERY_S
    for number in range(2, 1000):
        table.hear(report(f"h{number:04}"))
    await table.persist()
    await table.persist()
    assert (store.transactions, store.statements) == (5, 1003)


async def test_what_could_not_be_written_is_written_the_next_time(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = HostTable(store, Settings(), clock=Clock())
    table.hear(report("h1"))
    with monkeypatch.context() as patch:

        async def away(*_statements: Statement) -> list[Result]:
            raise OSError("away")

        patch.setattr(store, "write", away)
        with contextlib.suppress(OSError):
            await table.persist()
    await table.persist()
    assert [row["name"] for row in await rows(store)] == ["h1"]


async def test_reports_on_the_bus_make_a_host_that_can_be_chosen_at_once(store: CountingStore) -> None:
    bus = MemoryBus()
    table = HostTable(store, Settings())
    await table.open(bus)
    await table.persister.open()
    try:
        await bus.publish(HOST_REPORTS, Message("HostReport", msgspec.msgpack.encode(report("h1"))))
        together = HostReports((report("h2"), report("h3")))
        await bus.publish(HOST_REPORTS_TOGETHER, Message("HostReports", msgspec.msgpack.encode(together)))
        await eventually(lambda: has_rank(table, "h1", "h2", "h3"))
    finally:
        await table.persister.close()
        await table.close()
        await bus.close()
    assert [row["name"] for row in await rows(store)] == ["h1", "h2", "h3"]


async def test_a_table_that_did_not_run_itself_takes_no_host_for_silent(store: CountingStore) -> None:
    bus = MemoryBus()
    settings = msgspec.structs.replace(Settings(), host=HostSettings(heartbeat_s=0.1, down_after_s=1.0))
    table = HostTable(store, settings)
    await table.open(bus)
    try:
        await bus.publish(HOST_REPORTS, Message("HostReport", msgspec.msgpack.encode(report("h1"))))
        await eventually(lambda: is_up(table, "h1"))
        time.sleep(1.5)  # noqa: ASYNC251 - as one that is stopped
        assert table.is_up("h1") and not table.fell_silent("h1", 0.0)
        await asyncio.sleep(0.01)
        assert table.is_up("h1")
        await eventually(lambda: is_down(table, "h1"))
    finally:
        await table.close()
        await bus.close()


async def test_host_that_an_admin_said_to_be_down_is_waited_for_no_longer(store: CountingStore) -> None:
    """It still reports, and was heard a moment ago."""
    table = HostTable(store, Settings())
    table.hear(report("h1"))
    await table.persist()
    assert not table.fell_silent("h1", 0.0)
    for down in (True, False):
        await store.write(host_set_forced_down("h1", down))
        await table.refresh()
        table.hear(report("h1"))
        assert table.fell_silent("h1", 0.0) is down


async def test_table_that_only_follows_writes_nothing_and_learns_of_hosts_that_another_wrote(store: CountingStore) -> None:
    bus = MemoryBus()
    writer, follower, late = (HostTable(store, Settings()) for _ in range(3))
    await writer.open(bus)
    await follower.open(bus)
    try:
        await bus.publish(HOST_REPORTS, Message("HostReport", msgspec.msgpack.encode(report("h1"))))
        await eventually(lambda: is_up(follower, "h1"))
        assert await rows(store) == []
        assert not await has_rank(follower, "h1"), "nothing can be claimed on a host without a row"
        await writer.persist()
        await follower.refresh()
        assert await has_rank(follower, "h1")
        await late.open(bus)
        assert (late.names(), late.is_up("h1")) == (["h1"], False), "up is what it hears for itself"
    finally:
        for table in (writer, follower, late):
            await table.close()
        await bus.close()


async def is_up(table: HostTable, name: str) -> bool:
    return table.is_up(name)


async def is_down(table: HostTable, name: str) -> bool:
    return not table.is_up(name)


async def has_rank(table: HostTable, *names: str) -> bool:
    return [host.name for host in table.ranking] == list(names)


async def eventually(condition: Callable[[], Awaitable[bool]], *, within_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.005)


async def test_host_that_is_forgotten_while_others_read_fails_nobody(cloud: SmallCloud) -> None:
    """The loop and a request without room read the hosts at the same time: the second one found the host gone already."""
    await cloud.report("h1")
    await cloud.table.persist()
    await cloud.store.write(*host_delete("h1"))
    await asyncio.gather(cloud.table.refresh(), cloud.table.refresh())
    assert cloud.table.names() == []


async def test_host_that_is_forgotten_while_its_report_is_written_is_read_again(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    await cloud.table.persist()
    write = cloud.store.write

    async def forgotten_meanwhile(*statements: Statement) -> list[Result]:
        cloud.store.write = write  # type: ignore[method-assign]
        await cloud.store.write(*host_delete("h1"))
        await cloud.table.refresh()
        return await write(*statements)

    cloud.store.write = forgotten_meanwhile  # type: ignore[method-assign]
    await cloud.report("h1", persist=False, memory_mib=2048)
    await cloud.table.persist()
    await cloud.table.refresh()
    assert cloud.table.names() == ["h1"]


async def test_who_writes_for_all_no_more_writes_nothing_when_it_ends(cloud: SmallCloud) -> None:
    """A process that had been stopped wrote at its end what it had heard before, over what another had written since."""

    async def opened_by_a_keeper_of_the_past() -> None:
        guard_task(keeper_guard("gone"))
        await cloud.table.persister.open()

    await asyncio.create_task(opened_by_a_keeper_of_the_past())
    await cloud.report("h1", persist=False)
    await cloud.table.persister.close()
    assert not await rows(cloud.store)
