"""What the keeper of relays writes down, so that whoever comes after it goes on with the same."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from instar.nbd.keeper import RelayKeeper
from instar.nbd.monitor import MonitorError
from instar.nbd.relay import Relay, RelayExport, RelayPlan, UnixSource
from tests.patience import PATIENCE_S

PLAN = RelayPlan(UnixSource("/nowhere.sock", "e"), (RelayExport("e", True),), about="i")


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that runs is this process."""
    monkeypatch.setattr(Relay, "ensure", lambda _relay, _plan: os.getpid())


@pytest.mark.usefixtures("no_processes")
async def test_a_relay_whose_plan_could_not_be_written_is_none_and_the_next_call_writes_it(tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    plans.touch()  # no directory can be made here, as on a disk that is full
    keeper = RelayKeeper(tmp_path / "run", plans)
    with pytest.raises(MonitorError):
        await keeper.ensure("r", PLAN)
    assert keeper.plans() == {}
    plans.unlink()
    await keeper.ensure("r", PLAN)
    assert keeper.plans() == {"r": PLAN}
    assert RelayKeeper(tmp_path / "run", plans)._read_plans() == {"r": PLAN}  # what a restart of the agent finds
    assert [path.name for path in plans.iterdir()] == ["r.json"]
    await keeper.end("r")
    await keeper.close()


async def test_a_plan_is_written_although_the_end_of_another_takes_the_directory_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, opened = tmp_path / "plans", os.open
    keeper = RelayKeeper(tmp_path / "run", plans)

    def open_late(path: Path, *arguments: int) -> int:
        monkeypatch.undo()
        keeper._remove_plan("another")
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    keeper._write_plan("r", PLAN)
    assert keeper._read_plans() == {"r": PLAN}


async def test_the_end_of_a_relay_comes_after_its_making_also_when_nobody_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, begun, goes_on = list[str](), threading.Event(), threading.Event()

    def make(_relay: Relay, _plan: RelayPlan) -> int:
        begun.set()
        goes_on.wait(PATIENCE_S)
        done.append("made")
        return os.getpid()

    monkeypatch.setattr(Relay, "ensure", make)
    monkeypatch.setattr(Relay, "end", lambda _relay: done.append("ended"))
    keeper = RelayKeeper(tmp_path / "run", tmp_path / "plans")
    making = asyncio.create_task(keeper.ensure("r", PLAN))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    making.cancel()
    ending = asyncio.create_task(keeper.end("r"))
    await asyncio.sleep(0.1)
    goes_on.set()
    async with asyncio.timeout(PATIENCE_S):
        await ending
        await asyncio.wait([making])
        while "made" not in done:
            await asyncio.sleep(0.01)
    assert done == ["made", "ended"]
    assert making.cancelled()
    await keeper.close()
