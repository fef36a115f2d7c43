"""What a guest has written is there after every operation that keeps it, and gone after those that make the disk anew."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable

import pytest

from instar.lifecycle.evacuate import EvacuateArguments
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.rebuild import RebuildArguments
from instar.lifecycle.shelve import UnshelveArguments
from instar.lifecycle.snapshot import SnapshotArguments
from instar.model.instance import Instance, SpecImage
from instar.model.states import PowerState, VmState
from instar.store.flavors import flavor_fetch
from instar.store.hosts import host_set_forced_down
from tests.lifecycle.harness import Plane
from tests.lifecycle.watching import check_no_trace, faults, until

Act = Callable[[Plane, Instance], Awaitable[None]]


def data(one: Plane, instance: Instance) -> dict[str, str]:
    return faults(one, instance.host).read_data(instance.id)


def memory(one: Plane, instance: Instance) -> str:
    return faults(one, instance.host).memory(instance.id)


async def written(one: Plane, name: str = "guest") -> Instance:
    instance = await one.created(name)
    faults(one, instance.host).write_data(instance.id, "root", "before", "kept")
    return instance


async def does(one: Plane, action: str, instance: Instance, *arguments: object) -> Instance:
    """The instance after the operation, which ends well."""
    current = await one.fetch(instance.id)
    context = one.context(roles=("admin", "member", "reader"))
    await getattr(one.control.lifecycle, action)(context, current, *arguments)
    await one.settled()
    ended = await one.fetch(instance.id)
    assert ended.facts.fault is None, ended.facts.fault
    return ended


async def larger(one: Plane) -> object:
    return await flavor_fetch(one.control.store, "2", visible_to=None)


async def reboots(one: Plane, instance: Instance) -> None:
    for hard in (False, True):
        await one.control.lifecycle.reboot(one.context(), await one.fetch(instance.id), hard=hard)
        await one.settled()


async def stop_and_start(one: Plane, instance: Instance) -> None:
    await does(one, "stop", instance)
    await does(one, "start", instance)


async def shelved_to_another_host(one: Plane, instance: Instance) -> None:
    await does(one, "shelve", instance)
    (other, *_) = [host for host in one.hosts if host != instance.host]
    ended = await does(one, "unshelve", instance, UnshelveArguments(host=other))
    assert ended.host == other
    assert [port.definition.id for port in ended.facts.ports] == [port.definition.id for port in instance.facts.ports]


async def resized_and_confirmed(one: Plane, instance: Instance) -> None:
    resized = await does(one, "resize", instance, await larger(one))
    assert resized.vm_state is VmState.RESIZED
    assert (await does(one, "confirm_resize", instance)).spec.flavor.id == "2"


async def resized_and_reverted(one: Plane, instance: Instance) -> None:
    resized = await does(one, "resize", instance, await larger(one))
    assert data(one, resized) == {"before": "kept"}
    faults(one, resized.host).write_data(instance.id, "root", "after", "gone with the revert")
    reverted = await does(one, "revert_resize", instance)
    assert (reverted.spec.flavor.id, reverted.host) == ("1", instance.host)


async def migrated(one: Plane, instance: Instance) -> None:
    assert (await does(one, "migrate", instance)).host != instance.host
    await does(one, "confirm_resize", instance)


async def rescued(one: Plane, instance: Instance) -> None:
    image = await one.image()
    ended = await does(one, "rescue", instance, image.id)
    assert data(one, ended) == {"before": "kept"}, "its own disk is there, to be repaired"
    await does(one, "unrescue", instance)


@pytest.mark.parametrize(
    "act",
    [reboots, stop_and_start, shelved_to_another_host, resized_and_confirmed, resized_and_reverted, migrated, rescued],
)
async def test_what_was_written_is_there_after(one: Plane, act: Act) -> None:
    instance = await written(one)
    await act(one, instance)
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.power_state) == (VmState.ACTIVE, PowerState.RUNNING)
    assert data(one, ended) == {"before": "kept"}
    await does(one, "delete", instance)
    await check_no_trace(one)


@pytest.mark.parametrize("there_and_back", [("suspend", "resume"), ("pause", "unpause")])
async def test_memory_is_kept_over(one: Plane, there_and_back: tuple[str, str]) -> None:
    instance = await written(one)
    before = memory(one, instance)
    assert before
    for action in there_and_back:
        await does(one, action, instance)
    ended = await one.fetch(instance.id)
    assert (memory(one, ended), data(one, ended)) == (before, {"before": "kept"})


@pytest.mark.parametrize("paused", [False, True])
async def test_live_migration_keeps_memory_and_disk(one: Plane, paused: bool) -> None:
    instance = await written(one)
    if paused:
        instance = await does(one, "pause", instance)
    before = memory(one, instance)
    ended = await does(one, "migrate_live", instance, LiveArguments())
    assert ended.host != instance.host
    assert (ended.vm_state, ended.power_state) == (instance.vm_state, instance.power_state)
    assert (memory(one, ended), data(one, ended)) == (before, {"before": "kept"})


@pytest.mark.parametrize("stopped", [False, True])
async def test_server_from_an_image_of_another_has_its_data(one: Plane, stopped: bool) -> None:
    original = await written(one)
    before = memory(one, original)
    if stopped:
        await does(one, "stop", original)
    wanted = SnapshotArguments(str(uuid.uuid4()), "copy")
    ended = await does(one, "create_image", original, wanted)
    if not stopped:
        assert memory(one, ended) == before, "the guest went on"
    copy = await one.created("copy", image=SpecImage(wanted.image_id, "copy", virtual_size_bytes=1 << 20))
    assert copy.vm_state is VmState.ACTIVE, copy.facts.fault
    assert data(one, copy) == {"before": "kept"}


async def test_rebuild_makes_the_disk_anew(one: Plane) -> None:
    instance = await written(one)
    ended = await does(
        one, "rebuild", instance, RebuildArguments(image=await one.image(), spec=instance.spec, name="anew")
    )
    assert (ended.host, ended.name, data(one, ended)) == (instance.host, "anew", {})


async def test_evacuated_server_is_made_anew_and_its_old_host_cannot_harm_it(one: Plane) -> None:
    instance = await written(one)
    host = instance.host or ""
    faults(one, host).down = True

    async def known() -> bool:
        return not one.control.hosts.is_up(host)

    await until("the host is known to be down", known)
    await one.control.lifecycle.evacuate(one.context(roles=("admin",)), instance, EvacuateArguments())
    await one.settled()
    refused = await one.fetch(instance.id)
    assert (refused.host, refused.vm_state) == (host, VmState.ACTIVE), "its agent answers, and guests run without libvirt"
    assert refused.facts.fault is not None and "still in use" in refused.facts.fault.message
    await one.control.store.write(host_set_forced_down(host, True))
    await one.control.hosts.refresh()
    ended = await does(one, "evacuate", refused, EvacuateArguments())
    assert ended.host not in (None, host)
    assert data(one, ended) == {}
    new = faults(one, ended.host)
    new.write_data(instance.id, "root", "since", "kept")
    before = memory(one, ended)
    faults(one, host).down = False
    await one.control.store.write(host_set_forced_down(host, False))

    async def cleaned() -> bool:
        census = await one.world.host(host).census()
        return (census.guests, census.instance_dirs, census.with_ports) == ({}, (), ())

    await until("its leftovers are removed", cleaned)
    assert (memory(one, ended), data(one, ended)) == (before, {"since": "kept"})
    assert await one.findings() == []
