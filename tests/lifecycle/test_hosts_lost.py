"""Every operation, at every step: a host of it is lost there, and comes back soon or only when the operation has ended.

No operation waits for ever, and when the host is back there is one guest, with what it had written, and nothing else."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec
import pytest

from instar.config import HostSettings, LifecycleSettings
from instar.engine import hosts
from instar.model.states import VmState
from tests.lifecycle.device_acts import guest_volumes
from tests.lifecycle.harness import SETTINGS, Plane, hosts_up, prepared
from tests.lifecycle.losing import AWAY, SILENT, UNHEARD, Loss, check_whole, look_again
from tests.lifecycle.scenarios import SCENARIOS, victim
from tests.lifecycle.test_every_step import clean_steps
from tests.lifecycle.watching import check_no_trace
from tests.patience import slowness

QUICK = msgspec.structs.replace(
    SETTINGS,
    host=HostSettings(heartbeat_s=0.2, down_after_s=1.0, lost_after_s=1.0, power_sync_s=60),
    lifecycle=LifecycleSettings(wait_soft_reboot_seconds=0.1, shutdown_grace_s=0.1),
)
RETURNS_S = 0.15
NOT_READY_MAX_S = 3.0  # a host that was lost is waited for no longer; a step that only is slow has its whole deadline
ENDS_WITHIN_S = 60.0
PLANES_AT_ONCE = 8
THOROUGH = bool(os.environ.get("INSTAR_TEST_THOROUGHLY"))
LOSSES = {
    "away": (AWAY, None),
    "silent": (SILENT, None),
    "unheard a while": (UNHEARD, 1.8),
    "away a moment": (AWAY, RETURNS_S),
}


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "NOT_READY_MAX_S", NOT_READY_MAX_S)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
async def test_host_lost_at_any_step(tmp_path: Path, image_file: Path, name: str) -> None:
    """Two of the losses at each step, by turns; all of them with INSTAR_TEST_THOROUGHLY set."""
    steps = await clean_steps(tmp_path / "clean", image_file, name)
    turns = asyncio.Semaphore(PLANES_AT_ONCE)
    roles = ["source", "dest"] if SCENARIOS[name].before is not None else ["dest"]

    async def lose(number: int, step: str, role: str, loss: str) -> None:
        async with turns, prepared(tmp_path / f"{number}-{role}-{loss}", image_file, QUICK) as one:
            await lose_host(one, name, step, role, loss)

    cases = [
        (number, step, role, loss)
        for number, step in enumerate(steps)
        for of_role, role in enumerate(roles)
        for turn, loss in enumerate(LOSSES)
        if THOROUGH or (number + of_role + turn) % 2 == 0
    ]
    done = await asyncio.gather(*(lose(*case) for case in cases), return_exceptions=True)
    failures = [outcome for outcome in done if outcome is not None]
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(done)}", failures)  # type: ignore[type-var]


async def lose_host(one: Plane, name: str, step: str, role: str, loss: str) -> None:
    about = f"{name}: {role} {loss} at '{step}'"
    how, returns_s = LOSSES[loss]
    instance = await victim(one, SCENARIOS[name])
    source = instance.host if instance else None
    trouble = one.around_step = Loss(one, step, role, how, source=source, returns_s=returns_s)
    changed = await SCENARIOS[name].act(one, instance)
    started = time.monotonic()
    try:
        await one.settled()
    except TimeoutError as error:
        raise AssertionError(f"{about}: {error}") from None
    assert time.monotonic() - started < ENDS_WITHIN_S * slowness(), about
    one.around_step = None
    assert trouble.happened or trouble.host is None
    assert (await one.fetch(changed.id)).task_state is None, about
    trouble.come_back()
    await hosts_up(one)
    try:
        await look_again(one)
        ended = await check_whole(one, changed.id, about)
        if (await one.last_operation(changed.id)).result == "Error":
            assert ended.facts.fault is not None or ended.vm_state is VmState.ACTIVE, about
        if ended.vm_state is not VmState.DELETED:
            await one.control.lifecycle.delete(one.context(), ended)
            await one.settled()
        await check_gone(one)
    except Exception as error:
        error.add_note(about)
        raise


async def check_gone(one: Plane) -> None:
    """A host that was taken for silent once more, on a machine that is busy, is cleaned up when it is looked at again."""
    try:
        await check_no_trace(one)
    except AssertionError:
        await hosts_up(one)
        await look_again(one)
        await check_no_trace(one)


async def test_a_swap_whose_end_nobody_saw_takes_neither_volume_from_the_guest(
    tmp_path: Path, image_file: Path
) -> None:
    async with prepared(tmp_path, image_file, QUICK) as one:
        scenario = SCENARIOS["swap-volume"]
        instance = await victim(one, scenario)
        assert instance is not None
        trouble = one.around_step = Loss(one, "copy to new volume", "source", UNHEARD, source=instance.host)
        await scenario.act(one, instance)
        await one.settled()
        one.around_step = None
        unclear = await one.fetch(instance.id)
        both = {volume.volume_id for volume in unclear.facts.volumes}
        assert len(both) == 2 and len({volume.device for volume in unclear.facts.volumes}) == 2
        attachments = await one.control.volumes.attachments(instance.id)
        assert {(each.volume_id, each.status) for each in attachments} == {(each, "attached") for each in both}
        assert unclear.facts.fault is not None and "newer data" in unclear.facts.fault.message
        trouble.come_back()
        await hosts_up(one)
        await look_again(one)
        has = await guest_volumes(one, unclear)
        assert len(has) == 1 and has < both  # by its host: what it has is still its own, and served
        assert await one.findings() == []
        (stale,) = both - has
        await one.control.lifecycle.devices.detach_volume(one.context(), unclear, stale)
        await one.settled()
        assert {volume.volume_id for volume in (await one.fetch(instance.id)).facts.volumes} == has
