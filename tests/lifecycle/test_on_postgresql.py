"""Operations on PostgreSQL, killed with -9 at a step. INSTAR_TEST_DATABASE=postgresql runs all scenarios at every step."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

from tests.lifecycle.databases import SERVER
from tests.lifecycle.harness import plane
from tests.lifecycle.scenarios import SCENARIOS
from tests.lifecycle.test_every_step import KILL_DEADLINE_S, check_devices, findings, run_clean
from tests.postgresql_server import TestServer

SOME = ("create", "resize", "delete")  # each takes ten seconds; the others by INSTAR_TEST_DATABASE


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
async def test_kill_9_is_only_a_delay_on_postgresql_too(
    tmp_path: Path, image_file: Path, postgresql_server: TestServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(SERVER, postgresql_server.server.url.rpartition("/")[0])
    step = random.choice(await run_clean(tmp_path / "clean", image_file, name))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.lifecycle.dying", str(tmp_path), str(image_file), name, step,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(KILL_DEADLINE_S):
        out, errors = await child.communicate()
    assert child.returncode == -9, errors.decode()[-3000:]
    (told,) = [line for line in out.decode().splitlines() if line.startswith("instances ")]
    for when, instance_id in zip(("before", "after"), told.split()[1:], strict=True):
        async with plane(tmp_path / f"{when}-0") as one:
            await one.settled()
            ended = await one.fetch(instance_id)
            assert (ended.vm_state, ended.task_state) == (SCENARIOS[name].ends, None), f"killed {when} '{step}'"
            assert await findings(one, name) == [], f"killed {when} '{step}'"
            await check_devices(one, name, instance_id)
