"""A live migration whose two hosts both fall silent, just before or just after the guest has moved.

Nobody may start the guest from the disk that it has left behind: it runs on, or ran on, at the other host with newer data.
Whoever answers first, the guest is found where it is, and what is left of it elsewhere goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from instar.errors import Conflict
from instar.lifecycle.evacuate import EvacuateArguments
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.whereabouts import Side, side_of
from instar.model.guest import GuestState
from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from instar.store.hosts import host_set_forced_down
from tests.lifecycle.apart import Apart, apart_plane
from tests.lifecycle.device_acts import attach, new_volume
from tests.lifecycle.losing import reconciled
from tests.lifecycle.watching import check_no_trace, faults, until


@pytest.fixture
async def apart(tmp_path: Path, image_file: Path) -> AsyncIterator[Apart]:
    async with apart_plane(tmp_path / "cloud", image_file) as one:
        yield one


class Broken:
    """A live migration, of a guest with data and a volume, that broke off: both hosts are silent, the operation has ended.

    `moved`: the guest had moved already, and has written more since."""

    def __init__(self, one: Apart, instance: Instance, source: str, dest: str, memory: str) -> None:
        self.one, self.instance, self.source, self.dest, self.memory = one, instance, source, dest, memory

    def cut(self, host: str) -> None:
        self.one.buses[host].whole.clear()
        faults(self.one, host).cut_off = True

    async def force_down(self, host: str, down: bool) -> None:
        await self.one.control.store.write(host_set_forced_down(host, down))
        await self.one.control.hosts.refresh()

    async def returns(self, host: str, *, restarted: bool = False, settles: bool = True) -> None:
        """The host answers again, and was admitted."""
        if restarted:
            faults(self.one, host).host_restarts()
            self.one.boots[host] = "boot-2"
        faults(self.one, host).clear()
        self.one.buses[host].whole.set()
        await self.one.until_up(host, up=True)
        if settles:
            await reconciled(self.one, host)
            await self.one.settled()

    async def fetch(self) -> Instance:
        return await self.one.fetch(self.instance.id)

    async def check_unclear(self) -> None:
        """Nothing is concluded, and nothing begun: neither by the cloud itself nor by a user."""
        now = await self.fetch()
        assert (now.vm_state, now.task_state, now.host) == (VmState.ACTIVE, None, self.source)
        lifecycle, context = self.one.control.lifecycle, self.one.context()
        for refused in (lifecycle.stop, partial(lifecycle.reboot, hard=True)):
            with pytest.raises(Conflict, match="not known") as caught:
                await refused(context, now)
            assert self.source not in caught.value.user_message
            assert self.dest not in caught.value.user_message

    async def check_found(self, host: str, *, data: dict[str, str]) -> None:
        """The guest is on this host alone, as it was, and it is a server as any other again."""
        one, instance_id = self.one, self.instance.id

        async def is_found() -> bool:
            now = await self.fetch()
            return (now.host, now.task_state, now.maybe_on) == (host, None, None)

        await until(f"the guest is found on {host}", is_found)
        await one.settled()
        now = await self.fetch()
        assert (now.vm_state, now.power_state) == (VmState.ACTIVE, PowerState.RUNNING)
        assert one.runs_on(instance_id) == [host]
        assert faults(one, host).memory(instance_id) == self.memory
        assert faults(one, host).read_data(instance_id) == data
        claims = await one.control.store.read("SELECT host FROM claims")
        assert [row["host"] for row in claims] == [host]
        ports = await one.control.store.read("SELECT host, next_host FROM ports WHERE device_id = :id", {"id": instance_id})
        assert [(row["host"], row["next_host"] or "") for row in ports] == [(host, "")]
        assert [one.host for one in await one.control.volumes.attachments(instance_id)] == [host]

    async def check_clean(self) -> None:
        """Once both hosts are back nothing is left but the guest, and it can be used and deleted."""
        one = self.one
        now = await self.fetch()

        async def is_clean() -> bool:
            return await one.findings() == []

        await until("nothing is left elsewhere", is_clean)
        await one.control.lifecycle.reboot(one.context(), now, hard=True)
        await one.settled()
        assert (await one.last_operation(now.id)).result == "Success"
        await one.control.lifecycle.delete(one.context(), await self.fetch())
        await one.settled()
        await check_no_trace(one)


async def broken(one: Apart, *, moved: bool) -> Broken:
    instance = await one.created()
    await new_volume(one, "data")
    await attach(one, instance)
    await one.settled()
    source = instance.host or ""
    others = [host for host in one.hosts if host != source]
    dest = others[0]
    faults(one, source).write_data(instance.id, "root", "before", "kept")
    found = Broken(one, instance, source, dest, faults(one, source).memory(instance.id))
    faults(one, source).hang_next("migrate_live", after_work=moved)

    async def cut(name: str, call):  # type: ignore[no-untyped-def]
        if name != "migrate guest":
            return await call()
        moving = asyncio.ensure_future(call())

        async def has_moved() -> bool:
            return one.runs_on(instance.id) == [dest]

        if moved:
            await until("the guest has moved", has_moved)
            faults(one, dest).write_data(instance.id, "root", "after", "kept, too")
        for host in (source, dest):
            found.cut(host)
        return await moving

    one.around_step = cut
    await one.control.lifecycle.migrate_live(
        one.context(roles=("admin",)), await one.fetch(instance.id), LiveArguments(host=dest)
    )
    await one.settled()
    one.around_step = None
    assert (await one.last_operation(instance.id)).result == "Error"
    for host in (source, dest):
        await one.until_up(host, up=False)
    await found.check_unclear()
    return found


BEFORE, AFTER = {"before": "kept"}, {"before": "kept", "after": "kept, too"}


@pytest.mark.parametrize("restarted", [False, True], ids=["", "its machine was restarted"])
async def test_source_answers_first_and_the_guest_is_awaited_from_the_destination(apart: Apart, restarted: bool) -> None:
    one = await broken(apart, moved=True)
    await one.returns(one.source, restarted=restarted)
    await one.check_unclear()
    assert apart.runs_on(one.instance.id) == [one.dest], "started from the disk that it has left"
    await one.returns(one.dest)
    await one.check_found(one.dest, data=AFTER)
    await one.check_clean()


async def test_destination_answers_first_and_keeps_the_guest_that_it_has(apart: Apart) -> None:
    one = await broken(apart, moved=True)
    await one.returns(one.dest)
    await one.check_found(one.dest, data=AFTER)  # although the source never came back
    await one.returns(one.source)
    await one.check_clean()


@pytest.mark.parametrize("first", ["source", "destination"])
async def test_guest_that_did_not_move_goes_on_where_it_was(apart: Apart, first: str) -> None:
    one = await broken(apart, moved=False)
    if first == "destination":
        await one.returns(one.dest)
        await one.check_unclear()  # the source may still be at it
    await one.returns(one.source)
    await one.check_found(one.source, data=BEFORE)
    if first == "source":
        await one.returns(one.dest)
    await one.check_clean()


async def test_admin_gives_up_a_destination_that_is_lost_for_good(apart: Apart) -> None:
    one = await broken(apart, moved=True)
    lifecycle, context = apart.control.lifecycle, apart.context(roles=("admin",))
    await one.returns(one.source)
    await lifecycle.reset_state(context, await one.fetch(), VmState.ACTIVE)
    await apart.settled()
    await one.check_unclear()  # the destination may come back: nobody said that it is lost
    await one.force_down(one.dest, True)
    await lifecycle.reset_state(context, await one.fetch(), VmState.ACTIVE)
    await apart.settled()
    now = await one.fetch()
    assert (now.host, now.maybe_on) == (one.source, None)
    await lifecycle.reboot(context, now, hard=True)
    await apart.settled()
    assert faults(apart, one.source).read_data(now.id) == BEFORE
    assert sorted(apart.runs_on(now.id)) == sorted([one.source, one.dest]), "nobody could end the other one"
    await one.force_down(one.dest, False)
    await one.returns(one.dest)
    assert apart.runs_on(now.id) == [one.source]
    await one.check_clean()


async def test_admin_gives_up_a_source_that_is_lost_for_good(apart: Apart) -> None:
    """The guest has come, and is off since its host was restarted: the source might have taken it back."""
    one = await broken(apart, moved=True)
    await one.returns(one.dest, restarted=True)
    await one.check_unclear()
    await one.force_down(one.source, True)
    await apart.control.lifecycle.reset_state(apart.context(roles=("admin",)), await one.fetch(), VmState.ACTIVE)
    await apart.settled()
    now = await one.fetch()
    assert (now.host, now.maybe_on) == (one.dest, None)
    await apart.control.lifecycle.reboot(apart.context(), now, hard=True)
    await apart.settled()
    assert faults(apart, one.dest).read_data(now.id) == AFTER
    await one.force_down(one.source, False)
    await one.returns(one.source)
    await one.check_clean()


async def test_both_hosts_are_lost_and_the_server_is_evacuated(apart: Apart) -> None:
    one = await broken(apart, moved=True)
    ended = await apart.evacuated(await one.fetch())
    assert (ended.vm_state, ended.facts.fault, ended.maybe_on) == (VmState.ACTIVE, None, None)
    assert ended.host not in (one.source, one.dest)
    for host in (one.dest, one.source):
        await one.returns(host)
    assert apart.runs_on(ended.id) == [ended.host]
    await one.check_clean()


async def test_it_is_not_evacuated_from_its_source_while_the_destination_has_it(apart: Apart) -> None:
    one = await broken(apart, moved=True)
    instance = await one.fetch()

    async def unheard(name: str, call):  # type: ignore[no-untyped-def]
        if name == "make sure it is not on the other host":
            await one.returns(one.dest, settles=False)
        return await call()

    apart.around_step = unheard
    await apart.control.lifecycle.evacuate(apart.context(roles=("admin",)), instance, EvacuateArguments())
    await apart.settled()
    apart.around_step = None
    await reconciled(apart, one.dest)
    await one.check_found(one.dest, data=AFTER)


async def test_delete_removes_it_from_both(apart: Apart) -> None:
    one = await broken(apart, moved=True)
    await apart.control.lifecycle.delete(apart.context(), await one.fetch())
    await apart.settled()
    for host in (one.source, one.dest):
        await one.returns(host)
    await check_no_trace(apart)


async def test_reset_state_while_the_guest_moves_loses_no_guest(apart: Apart) -> None:
    """The operation is unwound, but cannot be: the guest has come. It is found there."""
    instance = await apart.created()
    source = instance.host or ""
    faults(apart, source).hang_next("migrate_live", after_work=True)
    await apart.control.lifecycle.migrate_live(apart.context(roles=("admin",)), instance, LiveArguments())

    async def has_moved() -> bool:
        return apart.runs_on(instance.id) not in ([], [source])

    await until("the guest has moved", has_moved)
    (dest,) = apart.runs_on(instance.id)
    await apart.control.lifecycle.reset_state(apart.context(roles=("admin",)), instance, VmState.ACTIVE)
    await apart.settled()
    faults(apart, source).release()
    await reconciled(apart, dest)
    await apart.settled()
    ended = await apart.fetch(instance.id)
    assert (ended.host, ended.vm_state, ended.maybe_on) == (dest, VmState.ACTIVE, None)
    assert apart.runs_on(instance.id) == [dest]
    assert await apart.findings() == []


async def test_host_is_let_in_although_another_does_not_tell_whether_it_has_a_guest(apart: Apart) -> None:
    """The guest that the returning host has may be the only one: it stays, and the host works for others meanwhile."""
    instance = await apart.created()
    old, bus = instance.host or "", apart.buses[instance.host or ""]
    bus.whole.clear()
    await apart.until_up(old, up=False)
    ended = await apart.evacuated(await apart.fetch(instance.id))
    apart.buses[ended.host or ""].whole.clear()
    await apart.until_up(ended.host or "", up=False)
    bus.whole.set()
    await apart.until_up(old, up=True)
    assert old in apart.runs_on(instance.id)
    apart.buses[ended.host or ""].whole.set()
    await apart.until_up(ended.host or "", up=True)
    await reconciled(apart, old)
    assert apart.runs_on(instance.id) == [ended.host]


GONE, OFF, COMES = GuestState(False), GuestState(True, PowerState.SHUTDOWN), GuestState(True)
RUNS, STILL = GuestState(True, PowerState.RUNNING, 1), GuestState(True, PowerState.PAUSED, 1)
S, D = Side.SOURCE, Side.DEST


@pytest.mark.parametrize(
    ("source", "dest", "side", "of_paused"),
    [
        (RUNS, None, S, S), (RUNS, GONE, S, S), (RUNS, COMES, S, S),
        (STILL, None, None, S), (STILL, GONE, S, S), (STILL, COMES, None, S), (STILL, RUNS, D, D), (STILL, STILL, D, D),
        (STILL, OFF, D, S),
        (None, None, None, None), (None, RUNS, D, D), (None, STILL, D, D), (None, OFF, None, None),
        (None, GONE, None, None), (None, COMES, None, None),
        (GONE, None, None, None), (GONE, RUNS, D, D), (GONE, OFF, D, D), (GONE, GONE, S, S), (GONE, COMES, None, None),
        (OFF, None, None, None), (OFF, RUNS, D, D), (OFF, OFF, D, D), (OFF, GONE, S, S), (OFF, COMES, None, None),
    ],
)  # fmt: skip
def test_where_the_guest_is_by_what_its_hosts_say(
    source: GuestState | None, dest: GuestState | None, side: Side | None, of_paused: Side | None
) -> None:
    assert side_of(source, dest, was_paused=False) is side
    assert side_of(source, dest, was_paused=True) is of_paused
