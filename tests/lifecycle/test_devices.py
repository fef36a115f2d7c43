"""Volumes of instances beyond the shared suite: what is refused, who waits for whom, and where a volume goes with moves."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from instar.errors import BadRequest, Conflict, HypervisorError, NotFound, VolumeFailed, WrongState
from instar.hypervisor.libvirt.device_xml import add_disk, add_volume, taken_targets
from instar.lifecycle.audit import Kind
from instar.lifecycle.definition import disks_of, guest_of
from instar.lifecycle.devices import VolumeWish
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.shelve import UnshelveArguments
from instar.model.instance import Instance
from instar.model.states import VmState
from instar.model.volume import VolumeConnection
from instar.store.flavors import flavor_fetch
from tests.lifecycle import device_acts as acts
from tests.lifecycle.harness import Plane
from tests.lifecycle.watching import Held, faults
from tests.patience import PATIENCE_S


async def with_volume(one: Plane) -> tuple[Instance, str]:
    instance = await acts.attached(one, await one.created("victim"))
    return instance, instance.facts.volumes[0].volume_id


async def test_attaches_at_the_same_moment_get_devices_of_their_own(one: Plane) -> None:
    instance = await one.created()
    ids = [await acts.new_volume(one, f"v{number}") for number in range(3)]
    attach = one.control.lifecycle.devices.attach_volume
    made = await asyncio.gather(*(attach(one.context(), instance, VolumeWish(volume_id)) for volume_id in ids))
    assert {volume.device for volume in made} == {"vdb", "vdc", "vdd"}
    await one.settled()
    await acts.check_volumes(one, await one.fetch(instance.id), set(ids), set())


async def test_what_cannot_be_attached_is_refused_and_leaves_nothing(one: Plane) -> None:
    instance, volume_id = await with_volume(one)
    other, devices = await one.created("other"), one.control.lifecycle.devices
    with pytest.raises(NotFound):
        await devices.attach_volume(one.context(), other, VolumeWish("0b5c1c4e-0000-4000-8000-000000000000"))
    with pytest.raises(BadRequest, match="in-use"):
        await devices.attach_volume(one.context(), other, VolumeWish(volume_id))
    with pytest.raises(BadRequest, match="already attached"):
        await devices.attach_volume(one.context(), instance, VolumeWish(volume_id))
    free = await acts.new_volume(one, "free")
    with pytest.raises(Conflict, match="/dev/vdb"):
        await devices.attach_volume(one.context(), instance, VolumeWish(free, device="/dev/vdb"))
    with pytest.raises(BadRequest, match="path"):
        await devices.attach_volume(one.context(), instance, VolumeWish(free, device="../../etc"))
    with pytest.raises(NotFound):
        await devices.detach_volume(one.context(), instance, free)
    with pytest.raises(NotFound):
        await devices.attach_volume(one.context("elsewhere"), other, VolumeWish(free))
    assert await acts.status_of(one, free) == "available"
    assert await one.findings() == []


async def test_a_device_that_is_asked_for_is_given(one: Plane) -> None:
    instance = await one.created()
    wish = VolumeWish(await acts.new_volume(one), device="/dev/vdf", tag="mine", delete_on_termination=True)
    volume = await one.control.lifecycle.devices.attach_volume(one.context(), instance, wish)
    await one.settled()
    (found,) = (await one.fetch(instance.id)).facts.volumes
    assert (found.device, found.tag, found.delete_on_termination) == ("vdf", "mine", True) == (
        volume.device, volume.tag, volume.delete_on_termination,
    )  # fmt: skip
    (attachment,) = await one.control.volumes.attachments(instance.id)
    assert (attachment.device, attachment.host, attachment.status) == ("/dev/vdf", instance.host, "attached")


async def test_an_attach_whose_turn_comes_too_late_gives_the_volume_back(one: Plane) -> None:
    """The instance is deleted while the attach waits behind another operation."""
    instance = await acts.attached(one, await one.created("victim"))
    one.around_step = held = Held("detach from guest")
    await acts.detach(one, instance)
    await held.wait()
    late = await acts.new_volume(one, "late")
    await one.control.lifecycle.devices.attach_volume(one.context(), instance, VolumeWish(late))
    assert await acts.status_of(one, late) == "reserved"
    await one.control.lifecycle.delete(one.context(), instance)
    held.go.set()
    await one.settled()
    assert (await one.fetch(instance.id)).vm_state is VmState.DELETED
    assert await acts.status_of(one, late) == "available"
    assert await acts.status_of(one, await acts.volume_of(one, "data")) == "available"
    assert await one.findings() == []


async def test_a_reset_of_the_state_in_the_middle_of_an_attach_leaves_no_volume(one: Plane) -> None:
    instance = await acts.volume(one, await one.created("victim"))
    one.around_step = held = Held("complete attachment")
    await acts.attach(one, instance)
    await held.wait()
    await one.control.lifecycle.reset_state(one.context(roles=("admin",)), instance, VmState.ACTIVE)
    held.go.set()
    await one.settled()
    await acts.check_volumes(one, await one.fetch(instance.id), set(), {await acts.volume_of(one, "data")})
    assert await one.findings() == []


async def test_a_reservation_that_was_never_recorded_is_found_and_given_back(one: Plane) -> None:
    instance, volume_id = await one.created(), await acts.new_volume(one)
    await one.control.volumes.reserve("an-attachment", volume_id, instance_id=instance.id)
    assert [finding.subject for finding in await one.findings()] == ["an-attachment"]
    await one.control.reconciler.settle_database()
    assert await acts.status_of(one, volume_id) == "reserved"  # it may just be on its way
    await one.control.reconciler.settle_database()
    assert await acts.status_of(one, volume_id) == "available"
    assert await one.findings() == []


async def test_a_volume_that_is_being_detached_is_left_alone(one: Plane) -> None:
    instance, volume_id = await with_volume(one)
    one.around_step = held = Held("detach from guest")
    await acts.detach(one, instance)
    await held.wait()
    assert await acts.status_of(one, volume_id) == "detaching"
    with pytest.raises(BadRequest, match="already"):
        await acts.detach(one, instance)
    held.go.set()
    await one.settled()
    await acts.check_volumes(one, await one.fetch(instance.id), set(), {volume_id})


async def test_a_guest_that_does_not_let_go_keeps_its_volume(one: Plane) -> None:
    instance, volume_id = await with_volume(one)
    faults(one, instance.host).keeps_devices = True
    await acts.detach(one, instance)
    await one.settled()
    ended = await one.fetch(instance.id)
    assert ended.facts.fault is not None and "let go" in ended.facts.fault.message
    await acts.check_volumes(one, ended, {volume_id}, set())


async def test_volumes_of_paused_and_suspended_guests(one: Plane) -> None:
    instance = await acts.volume(one, await one.created("victim"))
    await one.control.lifecycle.suspend(one.context(), instance)
    await one.settled()
    with pytest.raises(WrongState):
        await acts.attach(one, await one.fetch(instance.id))
    assert await acts.status_of(one, await acts.volume_of(one, "data")) == "available"


async def test_the_volumes_of_an_offloaded_instance_are_reserved_and_come_with_it(one: Plane) -> None:
    instance, first = await with_volume(one)
    lifecycle = one.control.lifecycle
    await lifecycle.shelve(one.context(), instance)
    await one.settled()
    shelved = await one.fetch(instance.id)
    assert (shelved.vm_state, await acts.status_of(one, first)) == (VmState.SHELVED_OFFLOADED, "reserved")
    second = await acts.new_volume(one, "second")
    await lifecycle.devices.attach_volume(one.context(), shelved, VolumeWish(second))
    await lifecycle.devices.detach_volume(one.context(), await one.fetch(instance.id), first)
    await one.settled()
    assert [await acts.status_of(one, volume_id) for volume_id in (first, second)] == ["available", "reserved"]
    assert await one.findings() == []
    await lifecycle.unshelve(one.context(), await one.fetch(instance.id), UnshelveArguments())
    await one.settled()
    await acts.check_volumes(one, await one.fetch(instance.id), {second}, {first})


async def _placed(one: Plane, instance: Instance, volume_id: str) -> None:
    """The volume service says where the volume is: the server, its host, its device."""
    await one.settled()
    now = await one.fetch(instance.id)
    assert now.facts.fault is None, now.facts.fault
    (attachment,) = await one.control.volumes.attachments(instance.id)
    shown = (attachment.volume_id, attachment.instance_id, attachment.host, attachment.device, attachment.status)
    assert shown == (volume_id, instance.id, now.host, "/dev/vdb", "attached")
    await acts.check_volumes(one, now, {volume_id}, set())
    kinds = {finding.kind for finding in await one.findings()}
    assert not kinds & {Kind.ATTACHMENT, Kind.RESERVATION, Kind.EXPORT}


async def test_a_volume_stays_with_its_server_through_moves(one: Plane) -> None:
    instance, volume_id = await with_volume(one)
    lifecycle, admin = one.control.lifecycle, one.context(roles=("admin",))
    larger = await flavor_fetch(one.control.store, "2", visible_to=None)
    await lifecycle.resize(admin, instance, larger)
    await _placed(one, instance, volume_id)
    await lifecycle.revert_resize(admin, await one.fetch(instance.id))
    await _placed(one, instance, volume_id)
    await lifecycle.migrate(admin, await one.fetch(instance.id))
    await _placed(one, instance, volume_id)
    await lifecycle.confirm_resize(admin, await one.fetch(instance.id))
    await _placed(one, instance, volume_id)
    await lifecycle.migrate_live(admin, await one.fetch(instance.id), LiveArguments())
    await _placed(one, instance, volume_id)
    await lifecycle.reboot(admin, await one.fetch(instance.id), hard=True)
    await _placed(one, instance, volume_id)


@pytest.mark.parametrize("ends", [False, True])
async def test_what_was_said_last_decides_whether_a_volume_ends_with_its_server(one: Plane, ends: bool) -> None:
    instance, volume_id = await with_volume(one)
    devices = one.control.lifecycle.devices
    await devices.end_volume_with(instance, volume_id, not ends)
    await devices.end_volume_with(await one.fetch(instance.id), volume_id, ends)
    await one.control.lifecycle.delete(one.context(), await one.fetch(instance.id))
    await one.settled()
    if ends:
        with pytest.raises(NotFound):
            await acts.status_of(one, volume_id)
    else:
        assert await acts.status_of(one, volume_id) == "available"
    assert await one.findings() == []


async def test_a_hard_reboot_boots_without_a_volume_that_is_lost(one: Plane) -> None:
    """The volume cannot be connected again: the guest boots, the volume is given back, and the record says why."""
    instance, volume_id = await with_volume(one)

    async def lost(name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name == "connect volume vdb":
            raise VolumeFailed(volume_id=volume_id, reason="its data is gone")
        return await call()

    one.around_step = lost
    await one.control.lifecycle.reboot(one.context(), instance, hard=True)
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.power_state.name) == (VmState.ACTIVE, "RUNNING")
    assert ended.facts.fault is not None and volume_id in ended.facts.fault.message
    assert (await one.last_operation(instance.id)).result == "Error"
    await acts.check_volumes(one, ended, set(), {volume_id})
    assert await one.findings() == []


async def test_volumes_come_back_with_a_guest_that_is_started_or_resumed(one: Plane) -> None:
    instance, volume_id = await with_volume(one)
    door = one.control.lifecycle
    for act in (door.stop, door.start, door.suspend, door.resume):
        await act(one.context(), await one.fetch(instance.id))
        await one.settled()
        await acts.check_volumes(one, await one.fetch(instance.id), {volume_id}, set())
    steps = [step.name for step in await one.journal(instance.id)]
    assert "connect volume vdb" in steps


async def test_a_rescued_guests_own_disk_is_its_second_whatever_volumes_it_has(one: Plane) -> None:
    """A volume kept its name, vdb, while the server was rescued, and libvirt orders disks by their names: the rescue system
    had the volume as its second disk, and the one that was to be repaired as its third."""
    instance, volume_id = await with_volume(one)
    image = await one.image()
    await one.control.lifecycle.rescue(one.context(), instance, image.id)
    await one.settled()
    rescued = await one.fetch(instance.id)
    guest = guest_of(rescued, disks_of(rescued, None), ())
    names = [disk.name for disk in guest.disks]
    devices = ET.Element("devices")
    for disk in guest.disks:
        add_disk(devices, disk, Path("/nowhere"), guest, direct_io=False)
    connection = VolumeConnection("export", socket="/nowhere")
    for volume in guest.volumes:
        replaced = msgspec.structs.replace(volume, connection=connection)
        add_volume(devices, replaced, taken=taken_targets(devices), boots=False)
    order = {target.get("dev"): name for target, name in zip(devices.iter("target"), [*names, volume_id], strict=True)}
    assert order == {"vda": "rescue", "vdb": "root", "vdc": volume_id}


async def shared_volume(one: Plane, name: str) -> str:
    """A volume that several instances can have."""
    volume_id = str(uuid.uuid4())
    volumes = one.control.volumes
    await volumes.create(
        volume_id, project_id="demo", user_id="user", size_gib=1, name=name, volume_type="multiattach"
    )
    await volumes.until_available(volume_id, PATIENCE_S)
    return volume_id


async def test_volume_that_can_be_shared_is_swapped_while_nobody_else_writes_to_it(one: Plane) -> None:
    first, second = await one.created("first"), await one.created("second")
    old, new = await shared_volume(one, "old"), await shared_volume(one, "new")
    devices, context = one.control.lifecycle.devices, one.context()
    for instance, volume_id in ((first, old), (second, old)):
        await devices.attach_volume(context, instance, VolumeWish(volume_id))
        await one.settled()
    first, second = await one.fetch(first.id), await one.fetch(second.id)
    with pytest.raises(BadRequest, match=f"{old} has more than one read/write attachment"):
        await devices.swap_volume(context, first, old, new)
    await devices.detach_volume(context, second, old)
    await one.settled()
    # Nor for one that another has already: its data would be gone.
    await devices.attach_volume(context, await one.fetch(second.id), VolumeWish(new))
    await one.settled()
    with pytest.raises(BadRequest, match="in-use"):
        await devices.swap_volume(context, first, old, new)
    assert await acts.status_of(one, new) == "in-use"
    await devices.detach_volume(context, await one.fetch(second.id), new)
    await one.settled()

    held = one.around_step = Held("copy to new volume")
    await devices.swap_volume(context, first, old, new)
    await held.wait()
    for volume_id in (old, new):  # what the other wrote to either of them would not be where it is looked for
        with pytest.raises(BadRequest, match="Invalid volume"):
            await devices.attach_volume(context, await one.fetch(second.id), VolumeWish(volume_id))
    held.go.set()
    await one.settled()
    await acts.check_volumes(one, await one.fetch(first.id), {new}, {old})
    await devices.attach_volume(context, await one.fetch(second.id), VolumeWish(new))
    await one.settled()
    await acts.check_volumes(one, await one.fetch(second.id), {new}, {old})
    assert await one.findings() == []


async def test_swap_that_fails_leaves_a_shared_volume_to_be_shared(one: Plane) -> None:
    first, second = await one.created("first"), await one.created("second")
    old, new = await shared_volume(one, "old"), await shared_volume(one, "new")
    devices, context = one.control.lifecycle.devices, one.context()
    await devices.attach_volume(context, first, VolumeWish(old))
    await one.settled()
    faults(one, first.host).fail_next("swap_volume", HypervisorError(reason="no"))
    await devices.swap_volume(context, await one.fetch(first.id), old, new)
    await one.settled()
    assert (await one.last_operation(first.id)).result == "Error"
    await acts.check_volumes(one, await one.fetch(first.id), {old}, {new})
    await devices.attach_volume(context, second, VolumeWish(old))
    await one.settled()
    await acts.check_volumes(one, await one.fetch(second.id), {old}, {new})


async def test_swap_fails_for_a_volume_that_somebody_got_before_it_began(one: Plane) -> None:
    first, second = await one.created("first"), await one.created("second")
    old, new = await shared_volume(one, "old"), await shared_volume(one, "new")
    devices, context = one.control.lifecycle.devices, one.context()
    await devices.attach_volume(context, first, VolumeWish(old))
    await one.settled()
    held = one.around_step = Held("mark detaching")
    await devices.swap_volume(context, await one.fetch(first.id), old, new)
    await held.wait()
    one.around_step = None
    await devices.attach_volume(context, second, VolumeWish(old))
    held.go.set()
    await one.settled()
    assert "more than one read/write" in ((await one.last_operation(first.id)).message or "")
    await acts.check_volumes(one, await one.fetch(first.id), {old}, {new})
    await acts.check_volumes(one, await one.fetch(second.id), {old}, {new})
