"""What the store and the bus do is counted where they are put together; an operation is counted where it ran."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from instar.bus.contract import Message, NobodyListens, Reply
from instar.bus.memory import MemoryBus
from instar.bus.metered import MeteredBus
from instar.errors import Conflict
from instar.metrics import numbers
from instar.store.contract import Statement
from instar.store.metered import MeteredStore
from instar.store.sqlite import SqliteStore


def counted(name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(numbers.page().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


async def test_transactions_are_counted_by_how_they_ended(tmp_path: Path):
    store = MeteredStore(SqliteStore(tmp_path / "instar.db", durable=False))
    await store.open()
    names = [("read", "ok"), ("write", "ok"), ("write", "refused"), ("read", "failed")]
    before = [counted("instar_store_seconds_count", kind=kind, result=result) for kind, result in names]
    insert = Statement("INSERT INTO cloud_keys VALUES ('a', '00', 1)", {}, duplicate=Conflict("taken"))
    await store.write(insert)
    with pytest.raises(Conflict):
        await store.write(insert)
    assert len(await store.read("SELECT * FROM cloud_keys")) == 1
    with pytest.raises(Exception, match=r"no such table|does not exist"):
        await store.read("SELECT * FROM nowhere")
    after = [counted("instar_store_seconds_count", kind=kind, result=result) for kind, result in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 1, 1]
    await store.close()


async def test_commands_are_counted_by_kind_of_queue_and_never_by_host():
    bus = MeteredBus(MemoryBus())
    began, go_on = asyncio.Event(), asyncio.Event()

    async def work(message: Message) -> Reply:
        began.set()
        await go_on.wait()
        return Reply(error=("HostUnreachable", "no", {})) if message.kind == "bad" else Reply()

    serving = await bus.serve("host.secret-name", work, concurrency_max=4)
    ok = counted("instar_bus_call_seconds_count", queue="host", result="ok")
    call = asyncio.create_task(bus.call("host.secret-name", Message("good", b"")))
    await began.wait()
    assert counted("instar_bus_calls_unanswered", queue="host") == 1
    assert counted("instar_bus_commands_worked_on", queue="host") == 1
    go_on.set()
    await call
    await bus.call("host.secret-name", Message("bad", b""))
    assert counted("instar_bus_calls_unanswered", queue="host") == 0
    assert counted("instar_bus_commands_worked_on", queue="host") == 0
    assert counted("instar_bus_call_seconds_count", queue="host", result="ok") == ok + 1
    assert counted("instar_bus_call_seconds_count", queue="host", result="error") >= 1
    with pytest.raises(NobodyListens):
        await bus.call("host.other", Message("good", b""))
    with pytest.raises(TimeoutError):
        go_on.clear()
        await bus.call("host.secret-name", Message("slow", b"", deadline_s=0.01))
    go_on.set()
    assert counted("instar_bus_call_seconds_count", queue="host", result="nobody") >= 1
    assert counted("instar_bus_call_seconds_count", queue="host", result="timeout") >= 1
    assert "secret-name" not in numbers.page().decode()
    await serving.cancel()
    await bus.close()
