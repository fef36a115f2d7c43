"""Operations that an earlier version began: this version finishes or unwinds each, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from instar.lifecycle.audit import Kind
from instar.model.states import VmState
from tests.lifecycle.harness import plane
from tests.lifecycle.scenarios import SCENARIOS
from tests.upgrade.recorder import RECORDED, ROOMY

# A copy of a disk goes to a file of the directory in which it was recorded, which is not there any more.
UNWOUND = frozenset({"image"})
CLOUDS = sorted(RECORDED.glob("*/cloud.tar.xz"))


@pytest.mark.parametrize("recorded", CLOUDS, ids=lambda path: path.parent.name)
async def test_operations_in_flight_at_the_upgrade_come_to_their_ends(tmp_path: Path, recorded: Path) -> None:
    shutil.unpack_archive(recorded, tmp_path)  # our own; Debian's Python 3.11.2 knows no filter for archives
    noted: dict[str, str] = json.loads((tmp_path / "noted.json").read_text())
    with closing(sqlite3.connect(tmp_path / "instar.db")) as database:
        rows = database.execute("SELECT instance_id FROM operations WHERE finished_at IS NULL").fetchall()
    assert sorted(row[0] for row in rows) == sorted(noted.values()), "what was recorded was not in flight"
    async with plane(tmp_path, ROOMY) as one:
        await one.settled()
        for name, instance_id in noted.items():
            ended, scenario = await one.fetch(instance_id), SCENARIOS[name]
            told = f"{name}: {ended.vm_state} {ended.task_state} {ended.facts.fault}"
            assert ended.task_state is None, told
            assert ended.vm_state in {scenario.ends, *scenario.failed}, told
            operation = await one.last_operation(instance_id)
            assert (operation.result == "Success") is (name not in UNWOUND), told
        assert [finding for finding in await one.findings() if finding.kind is not Kind.UPLOAD] == []
        for instance_id in noted.values():
            instance = await one.fetch(instance_id)
            if instance.vm_state is not VmState.DELETED:
                await one.control.lifecycle.delete(one.context(), instance)
        await one.settled()
        assert await one.guests() == {}
