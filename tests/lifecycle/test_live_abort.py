"""A live migration is aborted at any step: until it runs it does not begin, and afterwards it is as it would have been."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.errors import WrongState
from instar.lifecycle.live_migration import LiveArguments
from instar.model.move import IN_PROGRESS
from instar.model.states import PowerState, VmState
from instar.store.moves import migrations_of_instance
from tests.lifecycle.harness import Plane, prepared
from tests.lifecycle.losing import check_whole
from tests.lifecycle.test_every_step import clean_steps
from tests.lifecycle.watching import Held

RUNS = "migrate guest"


async def test_live_migration_is_aborted_at_every_step(tmp_path: Path, image_file: Path) -> None:
    steps = await clean_steps(tmp_path / "clean", image_file, "live-migrate")
    early = steps[steps.index("select hosts") : steps.index(RUNS)]
    assert len(early) >= 4, steps
    async with prepared(tmp_path / "cloud", image_file) as one:
        for step in [*early, *steps[steps.index(RUNS) + 1 :]]:
            await abort_at(one, step, ends_at_source=step in early)


async def abort_at(one: Plane, step: str, *, ends_at_source: bool) -> None:
    instance = await one.created()
    held = one.around_step = Held(step)
    await one.control.lifecycle.migrate_live(one.context(roles=("admin",)), instance, LiveArguments())
    await held.wait()
    (migration,) = await migrations_of_instance(one.control.store, instance.id)
    early = migration.uuid if migration.status == "preparing" else None
    for _ in range(2):  # asked twice, it is the same
        await one.control.lifecycle.guests.abort_migration(await one.fetch(instance.id), early=early)
    held.go.set()
    await one.settled()
    one.around_step = None
    ended = await check_whole(one, instance.id, f"aborted at '{step}'")
    assert (ended.vm_state, ended.power_state) == (VmState.ACTIVE, PowerState.RUNNING), step
    assert (ended.host == instance.host) is ends_at_source, step
    assert (ended.facts.fault is not None) is ends_at_source, step
    (migration,) = await migrations_of_instance(one.control.store, instance.id)
    assert migration.status == ("cancelled" if ends_at_source else "completed"), step
    assert migration.status not in IN_PROGRESS
    with pytest.raises(WrongState):
        await one.control.lifecycle.guests.abort_migration(ended)
    await one.control.lifecycle.delete(one.context(), ended)
    await one.settled()
