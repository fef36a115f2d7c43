"""Every operation on PostgreSQL and RabbitMQ, and one of them killed with -9 at a step. A sample: `make test-distributed`
breaks all of them there at every step."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.cli.servers.rabbitmq import PROGRAMS
from instar.model.states import VmState
from instar.store.contract import Statement
from tests.lifecycle.harness import UNHURRIED, Plane, plane, prepared
from tests.lifecycle.scenarios import SCENARIOS, victim
from tests.lifecycle.test_every_step import KILL_DEADLINE_S, check_devices, findings, run_clean
from tests.postgresql_server import SERVER, TestServer
from tests.rabbitmq_server import TestBroker

pytestmark = [pytest.mark.slow, pytest.mark.host]
KILLED = ("resize",)  # five seconds each on an idle machine
# The same operations from other states: those are for `make test-distributed`.
ALSO = frozenset({
    "reboot-rescued", "reboot-with-volume", "image-of-stopped", "image-of-volumes", "shelve-paused", "unshelve-in-place",
    "resize-stopped", "rebuild-stopped", "rebuild-from-volume", "evacuate-stopped", "attach-volume-stopped",
    "delete-soft-deleted", "delete-resized", "delete-shelved",
})  # fmt: skip


@pytest.fixture(scope="module")
def servers(postgresql_server: TestServer) -> Iterator[None]:
    """Both, for every cloud that is made, in this process and in others."""
    if not PROGRAMS.exists():
        pytest.skip("rabbitmq-server is not installed")
    broker = TestBroker()
    try:
        broker.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SERVER, postgresql_server.server.url.rpartition("/")[0])
            for name, value in broker.environment.items():
                patch.setenv(name, value)
            yield
    finally:
        broker.close()


@pytest.mark.usefixtures("servers")
async def test_every_operation_comes_to_its_end_on_postgresql_and_rabbitmq(tmp_path: Path, image_file: Path) -> None:
    async with prepared(tmp_path / "cloud", image_file, UNHURRIED) as one:
        for name, scenario in SCENARIOS.items():
            if name in ALSO:
                continue
            instance = await scenario.act(one, await victim(one, scenario))
            await one.settled()
            ended = await one.fetch(instance.id)
            assert (ended.vm_state, ended.facts.fault) == (scenario.ends, None), (name, ended.facts.fault)
            assert ended.power_state is scenario.power, name
            assert await findings(one, name) == [], name
            await check_devices(one, name, instance.id)
            await make_room(one, instance.id)


async def make_room(one: Plane, instance_id: str) -> None:
    """What is there is not the next scenario's."""
    left = await one.fetch(instance_id)
    if left.vm_state is not VmState.DELETED:
        await one.control.lifecycle.delete(one.context(), left)
        await one.settled()
    await one.control.store.write(Statement("UPDATE volumes SET name = 'of another'", {}))


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("name", KILLED)
async def test_kill_9_is_only_a_delay_on_postgresql_and_rabbitmq(tmp_path: Path, image_file: Path, name: str) -> None:
    step = random.choice(await run_clean(tmp_path / "clean", image_file, name, UNHURRIED))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.lifecycle.dying", str(tmp_path), str(image_file), name, step,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(KILL_DEADLINE_S):
        out, errors = await child.communicate()
    assert child.returncode == -9, errors.decode()[-3000:]
    (told,) = [line for line in out.decode().splitlines() if line.startswith("instances ")]
    for when, instance_id in zip(("before", "after"), told.split()[1:], strict=True):
        async with plane(tmp_path / f"{when}-0", UNHURRIED) as one:
            await one.settled()
            ended = await one.fetch(instance_id)
            assert (ended.vm_state, ended.task_state) == (SCENARIOS[name].ends, None), f"killed {when} '{step}'"
            assert await findings(one, name) == [], f"killed {when} '{step}'"
            await check_devices(one, name, instance_id)
