"""Volumes and interfaces of instances: what the shared tests do with them, and what must be so afterwards."""

from __future__ import annotations

import uuid

from instar.lifecycle.devices import VolumeWish
from instar.model.instance import Instance
from tests.lifecycle.harness import Plane

VOLUME_DEADLINE_S = 20.0


async def new_volume(plane: Plane, name: str = "data", size_gib: int = 1) -> str:
    """An empty volume of the project, available."""
    volume_id = str(uuid.uuid4())
    await plane.control.volumes.create(volume_id, project_id="demo", user_id="user", size_gib=size_gib, name=name)
    await plane.control.volumes.until_available(volume_id, VOLUME_DEADLINE_S)
    return volume_id


async def volume_of(plane: Plane, name: str) -> str:
    rows = await plane.control.store.read("SELECT id FROM volumes WHERE name = :name", {"name": name})
    return str(rows[0]["id"])


async def status_of(plane: Plane, volume_id: str) -> str:
    return (await plane.control.volumes.volume_fetch(volume_id, project_id="", is_admin=True)).status


async def guest_volumes(plane: Plane, instance: Instance) -> set[str]:
    """Ids of the volumes that the guest itself has on its host."""
    assert instance.host is not None
    guest = plane.world.host(instance.host)._machine.guests.get(instance.id)
    return {volume.volume_id for volume in guest.volumes} if guest else set()


# --- volumes ------------------------------------------------------------------------------------------------------------


async def volume(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await new_volume(plane)
    return instance


async def attach(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    wish = VolumeWish(await volume_of(plane, "data"))
    await plane.control.lifecycle.devices.attach_volume(plane.context(), instance, wish)
    return instance


async def attached(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await volume(plane, instance)
    await attach(plane, instance)
    await plane.settled()
    instance = await plane.fetch(instance.id)
    assert instance.facts.volumes, instance.facts.fault
    return instance


async def attached_of_two(plane: Plane, instance: Instance | None) -> Instance:
    await new_volume(plane, "other")
    return await attached(plane, instance)


async def detach(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    volume_id = await volume_of(plane, "data")
    await plane.control.lifecycle.devices.detach_volume(plane.context(), instance, volume_id)
    return instance


async def swap(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    old, new = await volume_of(plane, "data"), await volume_of(plane, "other")
    await plane.control.lifecycle.devices.swap_volume(plane.context(), instance, old, new)
    return instance


async def check_volumes(plane: Plane, instance: Instance, has: set[str], others: set[str]) -> None:
    """Record, volume service and guest agree."""
    assert {one.volume_id for one in instance.facts.volumes} == has
    assert {one.volume_id for one in await plane.control.volumes.attachments(instance.id)} == has
    assert [await status_of(plane, one) for one in has] == ["in-use"] * len(has)
    assert [await status_of(plane, one) for one in others] == ["available"] * len(others)
    if instance.power_state == 1:
        assert await guest_volumes(plane, instance) == has


async def check_attached(plane: Plane, instance: Instance, succeeded: bool) -> None:
    data = {await volume_of(plane, "data")}
    await check_volumes(plane, instance, data if succeeded else set(), set() if succeeded else data)


async def check_detached(plane: Plane, instance: Instance, succeeded: bool) -> None:
    data = {await volume_of(plane, "data")}
    gone = succeeded or not instance.facts.volumes  # from a point on it is done whatever fails
    await check_volumes(plane, instance, set() if gone else data, data if gone else set())


async def check_swapped(plane: Plane, instance: Instance, succeeded: bool) -> None:
    old, new = await volume_of(plane, "data"), await volume_of(plane, "other")
    if succeeded or {one.volume_id for one in instance.facts.volumes} == {new}:
        old, new = new, old
    await check_volumes(plane, instance, {old}, {new})
