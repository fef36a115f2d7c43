"""The operations that the shared tests break: how to get to where each can begin, and where it ends.

A new operation is one more entry: the suite takes its steps from the journal of a clean run."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import msgspec

from instar.errors import HostUnreachable, HypervisorError
from instar.lifecycle.door import Lifecycle
from instar.lifecycle.evacuate import EvacuateArguments
from instar.lifecycle.find_guest import FindArguments
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.rebuild import RebuildArguments
from instar.lifecycle.shelve import UnshelveArguments
from instar.lifecycle.snapshot import SnapshotArguments
from instar.model.instance import Flavor, Instance
from instar.model.states import PowerState, VmState
from instar.store.flavors import flavor_fetch
from instar.store.hosts import host_set_forced_down
from tests.lifecycle import device_acts as devices
from tests.lifecycle.harness import Plane
from tests.lifecycle.losing import reconciled

Act = Callable[[Plane, Instance | None], Awaitable[Instance]]
Check = Callable[[Plane, Instance, bool], Awaitable[None]]  # whether the operation succeeded


class Scenario(NamedTuple):
    """`failed` are the vm_states in which it may be after a failure that nothing made up for."""

    act: Act
    before: VmState | None
    ends: VmState
    failed: frozenset[VmState]
    power: PowerState
    ready: Act | None = None  # what else it needs before it begins
    check: Check | None = None  # what must be so afterwards
    after: Callable[[Plane], Awaitable[None]] | None = None  # what happens before anything is looked at


async def _create(plane: Plane, _: Instance | None) -> Instance:
    return await plane.create("victim")


async def _delete(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.delete(plane.context(), instance)
    return instance


async def _soft(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.reboot(plane.context(), instance, hard=False)
    return instance


async def _hard(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.reboot(plane.context(), instance, hard=True)
    return instance


async def _stop(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.stop(plane.context(), instance)
    return instance


async def _start(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.start(plane.context(), instance)
    return instance


def _door(name: str, *arguments: object) -> Act:
    """What a method of the door does, called with the instance and these arguments."""

    async def act(plane: Plane, instance: Instance | None) -> Instance:
        assert instance is not None
        given = [await argument(plane, instance) if callable(argument) else argument for argument in arguments]
        await getattr(plane.control.lifecycle, name)(plane.context(roles=("admin",)), instance, *given)
        return instance

    return act


async def _create_image(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    wanted = SnapshotArguments(str(uuid.uuid4()), "copy")
    await plane.control.lifecycle.create_image(plane.context(), instance, wanted)
    return instance


async def _create_backup(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    wanted = SnapshotArguments(str(uuid.uuid4()), "backup", backup_type="daily", rotation=1)
    await plane.control.lifecycle.create_image(plane.context(), instance, wanted)
    return instance


async def _larger(plane: Plane, _: Instance) -> Flavor:
    return await flavor_fetch(plane.control.store, "2", visible_to=None)


async def _rebuilt(plane: Plane, instance: Instance) -> RebuildArguments:
    spec = msgspec.structs.replace(instance.spec, metadata={"rebuilt": "yes"})
    return RebuildArguments(image=await plane.image(), spec=spec, name="anew")


async def _rebuilt_on_volume(plane: Plane, instance: Instance) -> RebuildArguments:
    spec = msgspec.structs.replace(instance.spec, metadata={"rebuilt": "yes"})
    return RebuildArguments(image=None, spec=spec, name="anew", volume_image_id=(await plane.image()).id)


async def _image_id(plane: Plane, _: Instance) -> str:
    return (await plane.image()).id


async def shelved_in_place(plane: Plane, instance: Instance | None) -> Instance:
    """Shelved, and still on its host: it could not leave it."""
    assert instance is not None

    async def cannot_leave(name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name == "remove guest":
            raise HypervisorError(reason="it stays for the test")
        return await call()

    plane.around_step = cannot_leave
    await plane.control.lifecycle.shelve(plane.context(), instance)
    await plane.settled()
    plane.around_step = None
    return instance


async def _soft_delete(plane: Plane, instance: Instance | None) -> Instance:
    """As where a reclaim interval is set."""
    assert instance is not None
    cloud = plane.control.cloud
    lifecycle = msgspec.structs.replace(cloud.settings.lifecycle, reclaim_instance_interval_s=3600)
    settings = msgspec.structs.replace(cloud.settings, lifecycle=lifecycle)
    door = Lifecycle(cloud._replace(settings=settings), plane.control.lifecycle._quota_limits)
    await door.delete(plane.context(), instance)
    return instance


async def _with_agent(plane: Plane, instance: Instance | None) -> Instance:
    """In the place of the instance one whose guest has an agent."""
    assert instance is not None
    await plane.control.lifecycle.delete(plane.context(), instance)
    image = await plane.image()
    properties = {**image.properties, "hw_qemu_guest_agent": "yes"}
    return await plane.created("victim", image=msgspec.structs.replace(image, properties=properties))


async def _host_down(plane: Plane, instance: Instance | None) -> Instance:
    """The instance's host, and no other, is down by an admin's word."""
    assert instance is not None
    for host in plane.hosts:
        await plane.control.store.write(host_set_forced_down(host, host == instance.host))
    await plane.control.hosts.refresh()
    return instance


async def _host_back(plane: Plane) -> None:
    """The host that was down is seen again: what it still has of the instance goes."""
    for host in plane.hosts:
        await plane.control.store.write(host_set_forced_down(host, False))
        await reconciled(plane, host)
    await plane.control.hosts.refresh()


def _out_of_sight(*, moved: bool) -> Act:
    """It is migrated live, and nobody sees the end of it: with the guest still at the source, or at the destination."""

    async def act(plane: Plane, instance: Instance | None) -> Instance:
        assert instance is not None

        async def unseen(name: str, call: Callable[[], Awaitable[object]]) -> object:
            if name in ("find guest", "leave it to be found"):
                return ""
            if name != "migrate guest":
                return await call()
            if moved:
                await call()
            raise HostUnreachable(host="any")

        plane.around_step = unseen
        plane.control.reconciler._find = _nobody_looks  # type: ignore[method-assign]  # before the test does
        await plane.control.lifecycle.migrate_live(plane.context(roles=("admin",)), instance, LiveArguments())
        await plane.settled()
        plane.around_step = None
        lost = await plane.fetch(instance.id)
        assert lost.maybe_on not in (None, lost.host), lost.facts.fault
        return lost

    return act


async def _nobody_looks(*_: object) -> None:
    """In the place of what the reconciler does by itself."""


async def _find(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.find_guest(plane.context(roles=("admin",)), instance, FindArguments())
    del plane.control.reconciler._find
    return instance


async def _looked_for(plane: Plane) -> None:
    """What is not found yet is found by the next look at its hosts."""
    plane.around_step = None
    for host in plane.hosts:
        await reconciled(plane, host)
        await plane.settled()


_V, _P = VmState, PowerState
# How to get from an active instance to where an operation can begin.
WAYS: Mapping[VmState, tuple[Act, ...]] = {
    _V.ACTIVE: (),
    _V.STOPPED: (_stop,),
    _V.PAUSED: (_door("pause"),),
    _V.SUSPENDED: (_door("suspend"),),
    _V.RESCUED: (_door("rescue", _image_id),),
    _V.RESIZED: (_door("resize", _larger),),
    _V.SHELVED_OFFLOADED: (_door("shelve"),),
    _V.SHELVED: (shelved_in_place,),
    _V.SOFT_DELETED: (_soft_delete,),
}


def _only(*states: VmState) -> frozenset[VmState]:
    return frozenset(states)


SCENARIOS: Mapping[str, Scenario] = {
    "create": Scenario(_create, None, _V.ACTIVE, _only(_V.ACTIVE, _V.ERROR), _P.RUNNING),
    "reboot-soft": Scenario(_soft, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE, _V.ERROR), _P.RUNNING),
    "reboot-hard": Scenario(_hard, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE, _V.ERROR), _P.RUNNING),
    "reboot-rescued": Scenario(_hard, _V.RESCUED, _V.RESCUED, _only(_V.RESCUED, _V.ERROR), _P.RUNNING),
    "stop": Scenario(_stop, _V.ACTIVE, _V.STOPPED, _only(_V.ACTIVE), _P.SHUTDOWN),
    "start": Scenario(_start, _V.STOPPED, _V.ACTIVE, _only(_V.STOPPED), _P.RUNNING),
    "pause": Scenario(_door("pause"), _V.ACTIVE, _V.PAUSED, _only(_V.ACTIVE), _P.PAUSED),
    "unpause": Scenario(_door("unpause"), _V.PAUSED, _V.ACTIVE, _only(_V.PAUSED), _P.RUNNING),
    "suspend": Scenario(_door("suspend"), _V.ACTIVE, _V.SUSPENDED, _only(_V.ACTIVE), _P.SHUTDOWN),
    "resume": Scenario(_door("resume"), _V.SUSPENDED, _V.ACTIVE, _only(_V.SUSPENDED), _P.RUNNING),
    "image": Scenario(_create_image, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING),
    "image-of-stopped": Scenario(_create_image, _V.STOPPED, _V.STOPPED, _only(_V.STOPPED), _P.SHUTDOWN),
    "backup": Scenario(_create_backup, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING),
    "shelve": Scenario(
        _door("shelve"), _V.ACTIVE, _V.SHELVED_OFFLOADED, _only(_V.ACTIVE, _V.SHELVED, _V.SHELVED_OFFLOADED), _P.SHUTDOWN
    ),
    "shelve-paused": Scenario(
        _door("shelve"), _V.PAUSED, _V.SHELVED_OFFLOADED, _only(_V.PAUSED, _V.SHELVED, _V.SHELVED_OFFLOADED), _P.SHUTDOWN
    ),
    "unshelve": Scenario(
        _door("unshelve", UnshelveArguments()), _V.SHELVED_OFFLOADED, _V.ACTIVE,
        _only(_V.SHELVED_OFFLOADED, _V.ACTIVE), _P.RUNNING,
    ),
    "resize": Scenario(_door("resize", _larger), _V.ACTIVE, _V.RESIZED, _only(_V.ACTIVE), _P.RUNNING),
    "resize-stopped": Scenario(_door("resize", _larger), _V.STOPPED, _V.RESIZED, _only(_V.STOPPED), _P.SHUTDOWN),
    "migrate": Scenario(_door("migrate"), _V.ACTIVE, _V.RESIZED, _only(_V.ACTIVE), _P.RUNNING),
    "confirm": Scenario(_door("confirm_resize"), _V.RESIZED, _V.ACTIVE, _only(_V.RESIZED, _V.ACTIVE), _P.RUNNING),
    "revert": Scenario(_door("revert_resize"), _V.RESIZED, _V.ACTIVE, _only(_V.RESIZED), _P.RUNNING),
    "rebuild": Scenario(_door("rebuild", _rebuilt), _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING),
    "rebuild-stopped": Scenario(_door("rebuild", _rebuilt), _V.STOPPED, _V.STOPPED, _only(_V.STOPPED), _P.SHUTDOWN),
    "rebuild-from-volume": Scenario(
        _door("rebuild", _rebuilt_on_volume), _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, devices.built_instead,
        devices.check_rebuilt,
    ),
    "rescue": Scenario(_door("rescue", _image_id), _V.ACTIVE, _V.RESCUED, _only(_V.ACTIVE), _P.RUNNING),
    "unrescue": Scenario(_door("unrescue"), _V.RESCUED, _V.ACTIVE, _only(_V.RESCUED, _V.ACTIVE), _P.RUNNING),
    "live-migrate": Scenario(
        _door("migrate_live", LiveArguments()), _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING
    ),
    "find-guest-that-moved": Scenario(
        _find, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING,
        _out_of_sight(moved=True), after=_looked_for,
    ),
    "find-guest-that-stayed": Scenario(
        _find, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING,
        _out_of_sight(moved=False), after=_looked_for,
    ),
    "shelve-offload": Scenario(
        _door("shelve_offload"), _V.SHELVED, _V.SHELVED_OFFLOADED, _only(_V.SHELVED), _P.SHUTDOWN
    ),
    "unshelve-in-place": Scenario(
        _door("unshelve", UnshelveArguments()), _V.SHELVED, _V.ACTIVE, _only(_V.SHELVED, _V.ACTIVE), _P.RUNNING
    ),
    "evacuate": Scenario(
        _door("evacuate", EvacuateArguments()), _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, _host_down,
        after=_host_back,
    ),
    "evacuate-stopped": Scenario(
        _door("evacuate", EvacuateArguments()), _V.STOPPED, _V.STOPPED, _only(_V.STOPPED), _P.SHUTDOWN, _host_down,
        after=_host_back,
    ),
    "change-password": Scenario(
        _door("change_password", "s3cret"), _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, _with_agent
    ),
    "soft-delete": Scenario(
        _soft_delete, _V.ACTIVE, _V.SOFT_DELETED, _only(_V.ERROR, _V.SOFT_DELETED), _P.SHUTDOWN
    ),
    "restore": Scenario(_door("restore"), _V.SOFT_DELETED, _V.ACTIVE, _only(_V.SOFT_DELETED), _P.RUNNING),
    "delete-soft-deleted": Scenario(
        _delete, _V.SOFT_DELETED, _V.DELETED, _only(_V.ERROR, _V.DELETED), _P.NOSTATE
    ),
    "delete": Scenario(_delete, _V.ACTIVE, _V.DELETED, _only(_V.ERROR, _V.DELETED), _P.NOSTATE),
    "delete-resized": Scenario(_delete, _V.RESIZED, _V.DELETED, _only(_V.ERROR, _V.DELETED), _P.NOSTATE),
    "delete-shelved": Scenario(_delete, _V.SHELVED_OFFLOADED, _V.DELETED, _only(_V.ERROR, _V.DELETED), _P.NOSTATE),
    "attach-volume": Scenario(
        devices.attach, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, devices.volume, devices.check_attached
    ),
    "attach-volume-stopped": Scenario(
        devices.attach, _V.STOPPED, _V.STOPPED, _only(_V.STOPPED), _P.SHUTDOWN, devices.volume, devices.check_attached
    ),
    "detach-volume": Scenario(
        devices.detach, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, devices.attached, devices.check_detached
    ),
    "swap-volume": Scenario(
        devices.swap, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING,
        devices.attached_of_two, devices.check_swapped,
    ),
    "reboot-with-volume": Scenario(
        _hard, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE, _V.ERROR), _P.RUNNING, devices.attached
    ),
    "create-from-volume": Scenario(
        devices.create_from_volumes, None, _V.ACTIVE, _only(_V.ACTIVE, _V.ERROR), _P.RUNNING, None, devices.check_built
    ),
    "delete-from-volume": Scenario(
        _delete, _V.ACTIVE, _V.DELETED, _only(_V.ERROR, _V.DELETED), _P.NOSTATE, devices.built_instead, devices.check_gone
    ),
    "image-of-volumes": Scenario(
        _create_image, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, devices.built_instead, devices.check_snapshots
    ),
    "attach-interface": Scenario(
        devices.plug, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, None, devices.check_plugged
    ),
    "detach-interface": Scenario(
        devices.unplug, _V.ACTIVE, _V.ACTIVE, _only(_V.ACTIVE), _P.RUNNING, devices.plugged, devices.check_unplugged
    ),
}  # fmt: skip


async def victim(plane: Plane, scenario: Scenario) -> Instance | None:
    """The instance that the operation is done to, in the state in which it may begin."""
    if scenario.before is None:
        return None
    instance = await plane.created("victim")
    assert instance.vm_state is VmState.ACTIVE, instance.facts.fault
    for act in WAYS[scenario.before]:
        await act(plane, instance)
        await plane.settled()
        instance = await plane.fetch(instance.id)
    assert instance.vm_state is scenario.before, instance.facts.fault
    if scenario.ready is not None:
        instance = await scenario.ready(plane, instance)
    return instance
