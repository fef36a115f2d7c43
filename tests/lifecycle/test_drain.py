"""A host is emptied: what runs, what is stopped, what cannot go; aborted, and over the end of its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.errors import Conflict, HypervisorError
from instar.lifecycle import drain as drains
from instar.model.instance import Instance
from instar.model.states import VmState
from instar.store.drains import DrainMode, DrainMove, DrainStatus, drain_abort, drain_begin, drain_fetch, drain_moves_fetch
from instar.store.hosts import host_delete, host_list, host_set_disabled
from instar.store.operations import operations_unfinished
from tests.lifecycle.harness import Plane, plane
from tests.lifecycle.watching import Held, check_no_trace, faults, until

HOST = "sim-0"


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drains, "LOOK_EVERY_S", 0.05)


async def begin(one: Plane, mode: DrainMode = DrainMode.AUTO, concurrency: int = 2) -> None:
    await one.control.store.write(host_set_disabled(HOST, True, "drain"), *drain_begin(HOST, mode, concurrency))


async def ended(one: Plane, status: DrainStatus = DrainStatus.DONE) -> dict[str, DrainMove]:
    async def is_so() -> bool:
        return (await drain_fetch(one.control.store, HOST)).status is status

    await until(f"the drain is {status}", is_so)
    return await drain_moves_fetch(one.control.store, HOST)


async def several(one: Plane) -> dict[str, Instance]:
    """On the host: of each state that matters one, by its name."""
    lifecycle, context = one.control.lifecycle, one.context()
    made = {name: await one.create(name, requested_host=HOST) for name in ("runs", "paused", "stopped", "suspended")}
    await one.settled()
    for name, act in (("paused", lifecycle.pause), ("stopped", lifecycle.stop), ("suspended", lifecycle.suspend)):
        await act(context, await one.fetch(made[name].id))
    await one.settled()
    return {name: await one.fetch(instance.id) for name, instance in made.items()}


async def states(one: Plane, made: dict[str, Instance]) -> dict[str, tuple[VmState, bool]]:
    """Of each by its name: its state, and whether it is on the host still."""
    now = {name: await one.fetch(instance.id) for name, instance in made.items()}
    assert all(instance.task_state is None and instance.facts.move is None for instance in now.values())
    return {name: (instance.vm_state, instance.host == HOST) for name, instance in now.items()}


async def test_what_can_be_moved_is_and_the_rest_stays_with_its_reason(one: Plane) -> None:
    made = await several(one)
    await begin(one)
    with pytest.raises(Conflict, match="is being drained"):
        await begin(one)
    moves = await ended(one)
    assert await states(one, made) == {
        "runs": (VmState.ACTIVE, False), "paused": (VmState.PAUSED, False), "stopped": (VmState.STOPPED, False),
        "suspended": (VmState.SUSPENDED, True),
    }  # fmt: skip
    told = {name: (moves[made[name].id].how, moves[made[name].id].status.value) for name in made}
    assert told == {
        "runs": ("live", "moved"), "paused": ("live", "moved"), "stopped": ("cold", "moved"), "suspended": ("", "left"),
    }  # fmt: skip
    assert moves[made["suspended"].id].reason == "It cannot be moved while it is suspended."
    assert (await one.create("later")).host != HOST
    await one.settled()
    assert await one.findings() == []

    # What was left is tried again by the next drain; an empty host can be deleted.
    await one.control.lifecycle.resume(one.context(), await one.fetch(made["suspended"].id))
    await one.settled()
    await begin(one, DrainMode.COLD)
    assert [move.how for move in (await ended(one)).values()] == ["cold"]
    assert (await states(one, made))["suspended"] == (VmState.ACTIVE, False)
    with pytest.raises(Conflict):
        await one.control.store.write(*host_delete(str((await one.fetch(made["runs"].id)).host)))
    await one.control.store.write(*host_delete(HOST))
    assert HOST not in {row["name"] for row in await host_list(one.control.store)}


async def test_live_alone_leaves_what_does_not_run_and_what_fails_twice(one: Plane) -> None:
    made = await several(one)
    for host in one.hosts[1:]:
        for _ in range(20):
            faults(one, host).fail_next("ensure_ready_for_live", HypervisorError(reason="no"))
    await begin(one, DrainMode.LIVE, concurrency=1)
    moves = await ended(one)
    assert {name for name, (_, stays) in (await states(one, made)).items() if stays} == set(made)
    assert moves[made["stopped"].id].reason == "It is stopped, which a drain moves only as: auto, cold; not as live."
    assert (moves[made["runs"].id].attempts, moves[made["runs"].id].status.value) == (2, "left")
    assert "No valid host" in moves[made["runs"].id].reason


async def test_abort_begins_nothing_more_and_lets_what_moves_come_to_its_end(one: Plane) -> None:
    made = {name: await one.create(name, requested_host=HOST) for name in ("a", "b", "c")}
    await one.settled()
    held = one.around_step = Held("set disks aside")
    await begin(one, DrainMode.COLD, concurrency=1)
    await held.wait()
    await one.control.store.write(drain_abort(HOST))
    held.go.set()
    moves = await ended(one, DrainStatus.ABORTED)
    assert [move.status.value for move in moves.values()] == ["moved"]
    assert sorted(stays for _, stays in (await states(one, made)).values()) == [False, True, True]
    with pytest.raises(Conflict, match="not being drained"):
        await one.control.store.write(drain_abort(HOST))


@pytest.mark.parametrize("step", ["select hosts", "migrate guest"])
async def test_abort_ends_live_migrations_with_their_guests_where_they_were(one: Plane, step: str) -> None:
    made = {name: await one.create(name, requested_host=HOST) for name in ("a", "b", "c")}
    await one.settled()
    faults(one, HOST).live_never_converges = True
    held = one.around_step = Held(step)
    if step == "migrate guest":
        held.go.set()
    await begin(one, concurrency=2)
    await held.wait()
    await one.control.store.write(drain_abort(HOST))
    held.go.set()
    moves = await ended(one, DrainStatus.ABORTED)
    assert 1 <= len(moves) <= 2
    assert {(move.how, move.status.value) for move in moves.values()} == {("live", "left")}
    assert all("was aborted" in move.reason for move in moves.values())
    assert set((await states(one, made)).values()) == {(VmState.ACTIVE, True)}
    assert {row["status"] for row in await one.control.store.read("SELECT status FROM moves")} == {"cancelled"}
    assert await one.findings() == []


async def test_drain_goes_on_after_the_end_of_its_process(tmp_path: Path, image_file: Path) -> None:
    async with plane(tmp_path) as one:
        await one.prepare(image_file)
        made = {name: await one.create(name, requested_host=HOST) for name in ("a", "b", "c")}
        await one.settled()
        held = one.around_step = Held("start guest")
        await begin(one, DrainMode.COLD, concurrency=2)
        await held.wait()
    async with plane(tmp_path) as one:
        moves = await ended(one)
        assert [move.status.value for move in moves.values()] == ["moved"] * 3
        assert set((await states(one, made)).values()) == {(VmState.ACTIVE, False)}
        assert await operations_unfinished(one.control.store) == []
        assert await one.findings() == []
        for instance in made.values():
            await one.control.lifecycle.delete(one.context(), await one.fetch(instance.id))
        await one.settled()
        await check_no_trace(one)
