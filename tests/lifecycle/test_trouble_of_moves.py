"""Moves, images and shelving in trouble: what is full, gone, cut off, never ends, or is due by time."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from instar.config import QuotaSettings, SimulatedSettings
from instar.engine.hosts import HostClient
from instar.errors import Conflict, DiskFull, HypervisorError, QuotaExceeded, StaleEpoch, WrongState
from instar.lifecycle import timers
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.rebuild import RebuildArguments
from instar.lifecycle.shelve import UnshelveArguments
from instar.lifecycle.snapshot import SnapshotArguments
from instar.model.instance import SHELVED_IMAGE, Instance
from instar.model.operation import Operation
from instar.model.states import PowerState, TaskState, VmState
from instar.store.audit import audit_usage
from instar.store.flavors import flavor_fetch
from instar.store.operations import operations_of_instance
from tests.lifecycle.device_acts import attach, new_volume, volume_of
from tests.lifecycle.harness import SETTINGS, Plane, plane, prepared
from tests.lifecycle.losing import check_whole, look_again
from tests.lifecycle.watching import Held, check_no_trace, faults, until, until_state
from tests.patience import PATIENCE_S

ADMIN = ("admin", "member", "reader")


@asynccontextmanager
async def one_with(directory: Path, image_file: Path, **changed: object) -> AsyncIterator[Plane]:
    """A plane with other lifecycle settings; `simulated` and `quota` replace those parts."""
    parts = {name: changed.pop(name) for name in ("simulated", "quota") if name in changed}
    lifecycle = msgspec.structs.replace(SETTINGS.lifecycle, **changed)
    async with prepared(directory, image_file, msgspec.structs.replace(SETTINGS, lifecycle=lifecycle, **parts)) as one:
        yield one


async def ask(one: Plane, action: str, instance: Instance, *arguments: object) -> None:
    current = await one.fetch(instance.id)
    await getattr(one.control.lifecycle, action)(one.context(roles=ADMIN), current, *arguments)


async def does(one: Plane, action: str, instance: Instance, *arguments: object) -> Instance:
    await ask(one, action, instance, *arguments)
    await one.settled()
    return await one.fetch(instance.id)


async def larger(one: Plane, flavor_id: str = "2"):  # type: ignore[no-untyped-def]
    return await flavor_fetch(one.control.store, flavor_id, visible_to=None)


async def images(one: Plane) -> int:
    return len(await one.control.store.read("SELECT id FROM images WHERE status <> 'deleted'"))


# --- images -------------------------------------------------------------------------------------------------------------


async def test_image_gone_at_unshelve_leaves_it_shelved_and_says_so(one: Plane) -> None:
    instance = await does(one, "shelve", await one.created())
    image_id = instance.facts.system_metadata[SHELVED_IMAGE]
    await one.control.images.discard(image_id)
    for _ in range(2):  # it may be tried again, and is the same
        ended = await does(one, "unshelve", instance, UnshelveArguments())
        assert (ended.vm_state, ended.task_state, ended.host) == (VmState.SHELVED_OFFLOADED, None, None)
        assert ended.facts.fault is not None
        assert image_id in ended.facts.fault.message
        assert await one.findings() == []
    await does(one, "delete", instance)
    await check_no_trace(one)


async def test_disk_full_at_a_snapshot_leaves_no_image(one: Plane) -> None:
    instance, before = await one.created(), await images(one)
    for action, arguments in (
        ("create_image", (SnapshotArguments(str(uuid.uuid4()), "copy"),)),
        ("shelve", ()),
    ):
        faults(one, instance.host).fail_next("take_snapshot", DiskFull(filesystem="/", host=instance.host))
        ended = await does(one, action, instance, *arguments)
        assert (ended.vm_state, ended.power_state) == (VmState.ACTIVE, PowerState.RUNNING)
        assert ended.facts.fault is not None
        assert await images(one) == before
        assert await one.findings() == []


async def test_backups_beyond_the_rotation_go_oldest_first(one: Plane) -> None:
    instance, made = await one.created(), []
    for number in range(4):
        wanted = SnapshotArguments(str(uuid.uuid4()), f"daily-{number}", backup_type="daily", rotation=2)
        await does(one, "create_image", instance, wanted)
        made.append(wanted.image_id)
    weekly = SnapshotArguments(str(uuid.uuid4()), "weekly", backup_type="weekly", rotation=1)
    await does(one, "create_image", instance, weekly)
    assert await one.control.images.backups_of(instance.id, "daily") == [made[3], made[2]]
    assert await one.control.images.backups_of(instance.id, "weekly") == [weekly.image_id]


# --- moves --------------------------------------------------------------------------------------------------------------


async def test_destinations_that_are_full_at_a_resize_put_everything_back(one: Plane) -> None:
    instance = await one.created()
    faults(one, instance.host).write_data(instance.id, "root", "before", "kept")
    for host in one.hosts:
        faults(one, host).disk_full = True
    ended = await does(one, "migrate", instance)
    assert (ended.vm_state, ended.power_state, ended.host) == (VmState.ACTIVE, PowerState.RUNNING, instance.host)
    assert ended.facts.fault is not None
    assert faults(one, instance.host).read_data(instance.id) == {"before": "kept"}
    await check_whole(one, instance.id, "after a full destination")


@pytest.mark.parametrize("returns", [True, False])
async def test_network_cut_during_a_disk_transfer(tmp_path: Path, image_file: Path, returns: bool) -> None:
    simulated = SimulatedSettings(hosts=3, move_s=0.3)
    async with one_with(tmp_path, image_file, simulated=simulated) as one:
        instance = await one.created()
        faults(one, instance.host).write_data(instance.id, "root", "before", "kept")
        await ask(one, "migrate", instance)
        await until("the disks are on their way", lambda: reached(one, instance.id, "fetch disks"))
        await asyncio.sleep(0.05)
        faults(one, instance.host).cut_off = True
        if returns:
            await asyncio.sleep(0.05)
            faults(one, instance.host).cut_off = False
        await one.settled()
        faults(one, instance.host).cut_off = False
        ended = await one.fetch(instance.id)
        assert ended.vm_state is (VmState.RESIZED if returns else VmState.ACTIVE), ended.facts.fault
        assert (ended.host == instance.host, ended.power_state) == (not returns, PowerState.RUNNING)
        assert faults(one, ended.host).read_data(instance.id) == {"before": "kept"}
        await look_again(one)
        await check_whole(one, instance.id, "after the cut")


async def reached(one: Plane, instance_id: str, step: str) -> bool:
    return step in [done.name for done in await one.journal(instance_id)]


async def test_revert_that_failed_half_way_is_repeated(one: Plane) -> None:
    instance = await one.created()
    faults(one, instance.host).write_data(instance.id, "root", "before", "kept")
    resized = await does(one, "resize", instance, await larger(one))
    for method in ("ensure_brought_back", "ensure_running"):
        faults(one, instance.host).fail_next(method, HypervisorError(reason="no"))
        half = await does(one, "revert_resize", instance)
        assert (half.vm_state, half.task_state) == (VmState.RESIZED, None)
        assert half.facts.fault is not None
        with pytest.raises(Exception, match="half reverted"):
            await ask(one, "confirm_resize", instance)
    ended = await does(one, "revert_resize", resized)
    assert (ended.vm_state, ended.host, ended.spec.flavor.id) == (VmState.ACTIVE, instance.host, "1")
    assert faults(one, ended.host).read_data(instance.id) == {"before": "kept"}
    assert await one.findings() == []


@pytest.mark.parametrize("action", ["resize", "rebuild"])
async def test_what_it_was_before_is_known_after_a_restart(tmp_path: Path, image_file: Path, action: str) -> None:
    """The record has the new size or image from a step on; a function that is called anew took it for the old one."""
    async with one_with(tmp_path, image_file) as one:
        instance = await one.created()
        held = Hold("take new flavor" if action == "resize" else "start guest")
        one.around_step = held
        if action == "resize":
            await ask(one, "resize", instance, await larger(one))
        else:
            spec = msgspec.structs.replace(instance.spec, metadata={"rebuilt": "yes"})
            await ask(one, "rebuild", instance, RebuildArguments(image=await one.image(), spec=spec, name="anew"))
        await until("it is there", held.is_there)

    def break_start(one: Plane) -> None:
        if action == "rebuild":
            faults(one, instance.host).fail_next("ensure_running")

    async with plane(tmp_path, before=break_start) as one:
        await one.settled()
        ended = await one.fetch(instance.id)
        if action == "resize":
            assert ended.vm_state is VmState.RESIZED
            ended = await does(one, "revert_resize", instance)
        assert (ended.vm_state, ended.spec.flavor.id, ended.spec.metadata) == (VmState.ACTIVE, "1", {})
        await look_again(one)
        await check_whole(one, instance.id, action)


class Hold:
    """The step of this name does its work, and then never ends."""

    def __init__(self, step: str) -> None:
        self._step, self._there = step, False

    async def __call__(self, name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name != self._step:
            return await call()
        if name != "start guest":
            await call()
        self._there = True
        await asyncio.Event().wait()
        return None

    async def is_there(self) -> bool:
        return self._there


@pytest.mark.parametrize("end", ["abort", "force", "delete"])
async def test_live_migration_that_never_converges(one: Plane, end: str) -> None:
    instance = await one.created()
    source = faults(one, instance.host)
    source.write_data(instance.id, "root", "before", "kept")
    memory = source.memory(instance.id)
    source.live_never_converges = True
    await ask(one, "migrate_live", instance, LiveArguments())
    await until("the guest is on its way", lambda: reached(one, instance.id, "migrate guest"))
    await asyncio.sleep(0.05)
    with pytest.raises(WrongState):
        await ask(one, "stop", instance)
    if end == "delete":
        await ask(one, "delete", instance)
        await one.settled()
        await check_no_trace(one)
        return
    await getattr(one.control.lifecycle.guests, f"{end}_migration")(await one.fetch(instance.id))
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.power_state) == (VmState.ACTIVE, PowerState.RUNNING)
    assert (ended.host == instance.host) is (end == "abort")
    assert (ended.facts.fault is not None) is (end == "abort")
    assert faults(one, ended.host).memory(instance.id) == memory
    assert faults(one, ended.host).read_data(instance.id) == {"before": "kept"}
    (record,) = await one.control.store.read("SELECT status FROM moves")
    assert record["status"] == ("cancelled" if end == "abort" else "completed")
    await check_whole(one, instance.id, end)


async def test_agent_refuses_what_an_older_operation_tells_it(one: Plane) -> None:
    instance = await one.created()
    old = HostClient(one.control.bus, instance_id=instance.id, epoch=(await one.last_operation(instance.id)).epoch)
    ended = await does(one, "stop", instance)
    for command in (old.ensure_absent, old.ensure_set_aside, old.ensure_no_disks):
        with pytest.raises(StaleEpoch):
            await command(instance.host or "")
    await check_whole(one, ended.id, "after stale commands")


# --- quota --------------------------------------------------------------------------------------------------------------


async def usage(one: Plane) -> tuple[int, int, int]:
    (row,) = await one.control.store.read("SELECT instances, cores, ram_mib FROM project_usage WHERE project_id = 'demo'")
    return row["instances"], row["cores"], row["ram_mib"]


@pytest.mark.parametrize("how", ["confirm", "revert", "fails", "smaller"])
async def test_quota_holds_over_a_resize_and_adds_up_at_each_step(tmp_path: Path, image_file: Path, how: str) -> None:
    quota = QuotaSettings(instances=5, cores=5, ram=700)
    async with one_with(tmp_path, image_file, quota=quota) as one:
        instance = await one.created()
        if how == "smaller":
            instance = await does(one, "resize", instance, await larger(one, "3"))
            instance = await does(one, "confirm_resize", instance)
            assert await usage(one) == (1, 1, 512)

        async def add_up(name: str, call: Callable[[], Awaitable[object]]) -> object:
            assert await audit_usage(one.control.store) == [], name
            if how == "fails" and name == "start guest":
                raise HypervisorError(reason="as the test wants")
            return await call()

        one.around_step = add_up
        with pytest.raises(QuotaExceeded):
            await ask(one, "resize", instance, await larger(one, "4"))
        ended = await does(one, "resize", instance, await larger(one, "1" if how == "smaller" else "3"))
        one.around_step = None if how == "fails" else add_up
        assert await usage(one) == ((1, 1, 128) if how == "fails" else (1, 1, 512)), "the larger of both until it is over"
        with pytest.raises(QuotaExceeded):
            await one.control.lifecycle.create(one.context(), [await one.new("second", flavor=await larger(one, "4"))])
        if how != "fails":
            ended = await does(one, "revert_resize" if how == "revert" else "confirm_resize", ended)
        assert ended.vm_state is VmState.ACTIVE
        assert await usage(one) == (1, 1, 512 if how == "confirm" else 128)
        assert await one.findings() == []


# --- due by time --------------------------------------------------------------------------------------------------------


async def begun(one: Plane, instance_id: str, action: str) -> list[Operation]:
    """The instance's last two operations, once the last one is `action`."""

    async def is_there() -> bool:
        return (await one.last_operation(instance_id)).action == action

    await until(f"{action} is begun", is_there)
    return (await operations_of_instance(one.control.store, instance_id))[:2]


async def test_resize_is_confirmed_by_itself(tmp_path: Path, image_file: Path) -> None:
    async with one_with(tmp_path, image_file, resize_confirm_window_s=0.2, timers_s=0.05) as one:
        instance = await one.created()
        await ask(one, "resize", instance, await larger(one))
        _, resized = await begun(one, instance.id, "confirmResize")
        assert (resized.action, resized.result) == ("resize", "Success")
        ended = await until_state(one, instance.id, VmState.ACTIVE)
        assert (ended.spec.flavor.id, ended.facts.move) == ("2", None)
        assert await one.findings() == []


async def test_servers_that_are_never_due_hide_none_that_are(one: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 200 that had been unchanged for longest were looked at, again and again."""
    monkeypatch.setattr(timers, "READ_AT_ONCE", 1)
    resized = {(await does(one, "resize", await one.created(), await larger(one))).id for _ in range(3)}
    looked_at: list[str] = []

    async def due(instance: Instance) -> None:
        looked_at.append(instance.id)
        raise Conflict("never")

    await timers.Timers(one.control.cloud, one.control.lifecycle)._each(VmState.RESIZED, due)
    assert sorted(looked_at) == sorted(resized)


async def test_shelved_server_leaves_its_host_after_a_time_or_never(tmp_path: Path, image_file: Path) -> None:
    async with one_with(tmp_path / "later", image_file, shelved_offload_s=0.3, timers_s=0.05) as one:
        instance = await one.created()
        await ask(one, "shelve", instance)
        _, shelved = await begun(one, instance.id, "shelveOffload")
        assert (shelved.action, shelved.result) == ("shelve", "Success")
        assert (await until_state(one, instance.id, VmState.SHELVED_OFFLOADED)).host is None
    async with one_with(tmp_path / "never", image_file, shelved_offload_s=-1, timers_s=0.05) as one:
        instance = await does(one, "shelve", await one.created())
        await asyncio.sleep(0.2)
        assert (await one.fetch(instance.id)).vm_state is VmState.SHELVED
        before = await images(one)
        ended = await does(one, "unshelve", instance, UnshelveArguments())
        assert (ended.vm_state, ended.host) == (VmState.ACTIVE, instance.host)
        assert await images(one) == before - 1


async def test_deleted_server_can_be_restored_until_it_is_reclaimed(tmp_path: Path, image_file: Path) -> None:
    async with one_with(tmp_path, image_file, reclaim_instance_interval_s=5.0, timers_s=0.05) as one:
        instance = await one.created()
        faults(one, instance.host).write_data(instance.id, "root", "before", "kept")
        ended = await does(one, "delete", instance)
        assert (ended.vm_state, ended.power_state) == (VmState.SOFT_DELETED, PowerState.SHUTDOWN)
        ended = await does(one, "restore", instance)
        assert (ended.vm_state, ended.power_state) == (VmState.ACTIVE, PowerState.RUNNING)
        assert faults(one, ended.host).read_data(instance.id) == {"before": "kept"}
        await does(one, "delete", instance)
        await until_state(one, instance.id, VmState.DELETED)
        await check_no_trace(one)


# --- turns, secrets, taking over ----------------------------------------------------------------------------------------


async def test_password_is_nowhere_when_the_operation_has_ended(one: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    image = msgspec.structs.replace(await one.image(), properties={"hw_qemu_guest_agent": "yes"})
    instance, secret = await one.created(image=image), "correct-horse-battery-staple"
    for broken in (False, True):
        if broken:
            faults(one, instance.host).fail_next("set_password", HypervisorError(reason="no"))
        await does(one, "change_password", instance, secret)
    for table in ("operations", "steps", "instances", "notifications"):
        rows = await one.control.store.read(f"SELECT * FROM {table}")
        for row in rows:
            for value in dict(row).values():
                text = value if isinstance(value, bytes) else str(value).encode()
                assert secret.encode() not in text, table
    captured = capsys.readouterr()
    assert secret not in captured.out + captured.err


async def test_what_has_no_task_state_waits_for_its_turn(one: Plane) -> None:
    instance = await one.created()
    await new_volume(one, "data")
    await new_volume(one, "other")
    held = one.around_step = Held("attach to guest")
    await attach(one, instance)
    async with asyncio.timeout(PATIENCE_S):
        while not held.reached.is_set() and (await one.last_operation(instance.id)).finished_at is None:
            await asyncio.sleep(0.005)
    await ask(one, "stop", instance)
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.task_state) == (VmState.STOPPED, None)
    assert [volume.volume_id for volume in ended.facts.volumes] == [await volume_of(one, "data")]
    assert await one.findings() == []


@pytest.mark.parametrize(("action", "step"), [("pause", "pause guest"), ("suspend", "save memory")])
async def test_hard_reboot_takes_over(one: Plane, action: str, step: str) -> None:
    instance = await one.created()
    held = one.around_step = Held(step)
    await ask(one, action, instance)
    await held.wait()
    assert (await one.fetch(instance.id)).task_state in (TaskState.PAUSING, TaskState.SUSPENDING)
    await one.control.lifecycle.reboot(one.context(), await one.fetch(instance.id), hard=True)
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.power_state, ended.facts.fault) == (VmState.ACTIVE, PowerState.RUNNING, None)
    await check_whole(one, instance.id, action)
