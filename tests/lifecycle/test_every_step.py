"""Every operation, at every step of a clean run's journal: fail there, undo twice, do it twice, kill -9 there.

The steps are read from the journal of a run in which nothing went wrong, so a new step is tested without a line here."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from instar.config import Settings
from instar.errors import HypervisorError
from instar.lifecycle.audit import Finding
from instar.model.states import VmState
from tests.lifecycle.harness import SETTINGS, Plane, plane, prepared
from tests.lifecycle.scenarios import SCENARIOS, victim

KILL_DEADLINE_S = 120


_clean: dict[str, list[str]] = {}


async def clean_steps(directory: Path, image_file: Path, name: str) -> list[str]:
    """The forward steps of the operation in a run without trouble."""
    if name not in _clean:
        _clean[name] = await run_clean(directory, image_file, name)
    return _clean[name]


async def run_clean(directory: Path, image_file: Path, name: str, settings: Settings = SETTINGS) -> list[str]:
    scenario = SCENARIOS[name]
    async with prepared(directory, image_file, settings) as one:
        instance = await scenario.act(one, await victim(one, scenario))
        await one.settled()
        ended = await one.fetch(instance.id)
        assert (ended.vm_state, ended.facts.fault) == (scenario.ends, None)
        assert ended.power_state is scenario.power
        assert await findings(one, name) == []
        await check_devices(one, name, instance.id)
        return [step.name for step in await one.journal(instance.id)]


class At:
    """What happens at one step: once, and not again when the step is repeated after a restart."""

    def __init__(self, step: str, how: str) -> None:
        self.step, self.how, self.happened = step, how, 0

    async def __call__(self, name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name != self.step:
            return await call()
        self.happened += 1
        if self.how == "fail before":
            raise HypervisorError(reason="the test wants it so")
        assert self.how == "fail after"
        await call()
        raise HypervisorError(reason="the test wants it so")


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize(
    ("how", "undo_twice"), [("fail before", False), ("fail after", True)], ids=["before", "after, undo twice"]
)
async def test_a_failure_at_any_step_puts_everything_back(
    tmp_path: Path, image_file: Path, name: str, how: str, undo_twice: bool
) -> None:
    scenario = SCENARIOS[name]
    steps = await clean_steps(tmp_path / "clean", image_file, name)
    for number, step in enumerate(steps):
        async with prepared(tmp_path / str(number), image_file) as one:
            instance = await victim(one, scenario)
            one.around_step, one.undo_twice = At(step, how), undo_twice
            changed = await scenario.act(one, instance)
            await one.settled()
            assert one.around_step.happened >= 1, f"step {step} was not reached"
            await check_put_back(one, name, changed.id, step)


async def check_put_back(one: Plane, name: str, instance_id: str, step: str) -> None:
    scenario = SCENARIOS[name]
    ended = await one.fetch(instance_id)
    assert ended.task_state is None, step
    assert await findings(one, name) == [], step
    guests = await one.guests()
    await check_devices(one, name, instance_id)
    if ended.vm_state is scenario.ends:
        return  # another host, or a later step, made up for it
    assert ended.vm_state in scenario.failed, f"{name} failed at '{step}' and left {ended.vm_state}"
    assert ended.facts.fault is not None, step
    assert (await one.last_operation(instance_id)).result == "Error"
    if name in ("create", "create-from-volume"):
        assert (guests, ended.host) == ({}, None), f"a failed build left something behind at '{step}'"
    # The way out is always open: whatever failed, a delete afterwards leaves nothing.
    one.around_step = None
    await one.control.lifecycle.delete(one.context(), ended)
    await one.settled()
    assert (await one.fetch(instance_id)).vm_state is VmState.DELETED
    assert await one.guests() == {}
    assert await one.findings() == []


async def findings(one: Plane, name: str) -> list[Finding]:
    after = SCENARIOS[name].after
    if after is not None:
        await after(one)
    return await one.findings()


async def check_devices(one: Plane, name: str, instance_id: str) -> None:
    check = SCENARIOS[name].check
    if check is not None:
        succeeded = (await one.last_operation(instance_id)).result == "Success"
        await check(one, await one.fetch(instance_id), succeeded)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_steps_done_twice_change_nothing(tmp_path: Path, image_file: Path, name: str) -> None:
    """All of them in one run; where that goes wrong, one after another, to tell which."""
    steps = await clean_steps(tmp_path / "clean", image_file, name)
    try:
        await done_twice(tmp_path / "all", image_file, name, set(steps))
    except Exception:
        for number, step in enumerate(steps):
            await done_twice(tmp_path / str(number), image_file, name, {step})
        raise


async def done_twice(directory: Path, image_file: Path, name: str, steps: set[str]) -> None:
    scenario, done = SCENARIOS[name], set()

    async def twice(step: str, call: Callable[[], Awaitable[object]]) -> object:
        if step in steps:
            done.add(step)
            await call()
        return await call()

    async with prepared(directory, image_file) as one:
        instance = await victim(one, scenario)
        one.around_step = twice
        changed = await scenario.act(one, instance)
        await one.settled()
        ended = await one.fetch(changed.id)
        assert (ended.vm_state, ended.facts.fault) == (scenario.ends, None), steps
        assert await findings(one, name) == [], steps
        await check_devices(one, name, ended.id)
        assert done == steps


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
async def test_kill_9_at_any_step_is_only_a_delay(tmp_path: Path, image_file: Path, name: str) -> None:
    """Killed before the work of the step, and after it."""
    scenario = SCENARIOS[name]
    steps = await clean_steps(tmp_path / "clean", image_file, name)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.lifecycle.dying", str(tmp_path), str(image_file), name, *steps,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(KILL_DEADLINE_S):
        out, errors = await child.communicate()
    assert child.returncode == -9, errors.decode()[-3000:]
    (told,) = [line for line in out.decode().splitlines() if line.startswith("instances ")]
    cases = [(when, number, step) for when in ("before", "after") for number, step in enumerate(steps)]
    for (when, number, step), instance_id in zip(cases, told.split()[1:], strict=True):
        async with plane(tmp_path / f"{when}-{number}") as one:
            await one.settled()
            ended = await one.fetch(instance_id)
            assert (ended.vm_state, ended.task_state) == (scenario.ends, None), f"killed {when} '{step}'"
            assert await findings(one, name) == [], f"killed {when} '{step}'"
            await check_devices(one, name, instance_id)
