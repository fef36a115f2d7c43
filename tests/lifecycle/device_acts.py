"""Volumes and interfaces of instances: what the shared tests do with them, and what must be so afterwards."""

from __future__ import annotations

import asyncio
import uuid

from instar.errors import NotFound
from instar.lifecycle.devices import VolumeWish
from instar.model.instance import Instance, RequestedVolume
from instar.model.network import RequestedNetwork
from tests.lifecycle.harness import Plane
from tests.patience import PATIENCE_S


async def new_volume(plane: Plane, name: str = "data", size_gib: int = 1) -> str:
    """An empty volume of the project, available."""
    volume_id = str(uuid.uuid4())
    await plane.control.volumes.create(volume_id, project_id="demo", user_id="user", size_gib=size_gib, name=name)
    await plane.control.volumes.until_available(volume_id, PATIENCE_S)
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


# --- interfaces -----------------------------------------------------------------------------------------------------------


async def network_of(plane: Plane) -> str:
    return str((await plane.control.store.read("SELECT id FROM networks"))[0]["id"])


async def plug(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    wanted = RequestedNetwork(network_id=await network_of(plane))
    await plane.control.lifecycle.devices.attach_interface(plane.context(), instance, wanted)
    return instance


async def plugged(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plug(plane, instance)
    await plane.settled()
    instance = await plane.fetch(instance.id)
    assert len(instance.facts.ports) == 2, instance.facts.fault
    return instance


async def unplug(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    port_id = instance.facts.ports[1].definition.id
    await plane.control.lifecycle.devices.detach_interface(plane.context(), instance, port_id)
    return instance


async def check_ports(plane: Plane, instance: Instance, count: int) -> None:
    """Record, network service, host and guest agree."""
    ids = [port.definition.id for port in instance.facts.ports]
    assert len(ids) == count
    owned = await plane.control.networks.ports_of(instance.id)
    assert [port.definition.id for port in owned] == ids
    assert sorted(await plane.control.networks.port_owners()) == sorted(ids)
    hosts = {row["host"] for row in await plane.control.store.read("SELECT host FROM ports")}
    assert hosts == {instance.host}
    assert instance.host is not None
    machine = plane.world.host(instance.host)._machine
    assert {port.id for port in machine.guests[instance.id].ports} == set(ids)
    # The networks' own refresh may have told the host of a port just before it was given back: it tells again.
    async with asyncio.timeout(PATIENCE_S):
        while {port.id for port in machine.ports[instance.id]} != set(ids):
            await asyncio.sleep(0.01)


async def check_plugged(plane: Plane, instance: Instance, succeeded: bool) -> None:
    await check_ports(plane, instance, 2 if succeeded else 1)


async def check_unplugged(plane: Plane, instance: Instance, succeeded: bool) -> None:
    gone = succeeded or len(instance.facts.ports) == 1
    await check_ports(plane, instance, 1 if gone else 2)


# --- servers that are booted from a volume ------------------------------------------------------------------------------


async def create_from_volumes(plane: Plane, _: Instance | None) -> Instance:
    """Its root is a new volume, made of an image and ending with it; a volume that is there already is its second disk."""
    data, image = await new_volume(plane), await plane.image()
    volumes = (
        RequestedVolume(
            str(uuid.uuid4()), str(uuid.uuid4()), boot_index=0, delete_on_termination=True, create=True, size_gib=1,
            image_id=image.id, device="vda",
        ),
        RequestedVolume(data, str(uuid.uuid4()), size_gib=1, device="vdb"),
    )  # fmt: skip
    return await plane.create("victim", volumes=volumes)


async def built_instead(plane: Plane, instance: Instance | None) -> Instance:
    """The same in the place of an instance that has a root disk."""
    assert instance is not None
    await plane.control.lifecycle.delete(plane.context(), instance)
    made = await create_from_volumes(plane, None)
    await plane.settled()
    made = await plane.fetch(made.id)
    assert made.vm_state == "active", made.facts.fault
    return made


async def check_built(plane: Plane, instance: Instance, succeeded: bool) -> None:
    root, data = (wanted.volume_id for wanted in instance.spec.volumes)
    if instance.vm_state == "deleted":
        return
    if not succeeded:
        assert not instance.facts.volumes
        assert await plane.control.volumes.attachments(instance.id) == ()
        assert await status_of(plane, data) == "available"
        await check_no_volume(plane, root)
        return
    await check_volumes(plane, instance, {root, data}, set())
    assert instance.host is not None
    assert "root" not in plane.world.host(instance.host)._machine.disks_of(instance.id)
    claims = await plane.control.store.read("SELECT disk_gib FROM claims WHERE instance_id = :id", {"id": instance.id})
    assert [row["disk_gib"] for row in claims] == [0]


async def check_rebuilt(plane: Plane, instance: Instance, succeeded: bool) -> None:
    """It has its volumes, and nothing of what the root had before is kept."""
    await check_built(plane, instance, True)
    assert (instance.spec.metadata == {"rebuilt": "yes"}) is succeeded
    assert not list((plane.state.path / "volumes").glob("*.kept"))


async def check_no_volume(plane: Plane, volume_id: str) -> None:
    try:
        info = await plane.control.volumes.volume_fetch(volume_id, project_id="", is_admin=True)
    except NotFound:
        return
    raise AssertionError(f"volume {volume_id} is still there, {info.status}")


async def check_gone(plane: Plane, instance: Instance, succeeded: bool) -> None:
    root, data = (wanted.volume_id for wanted in instance.spec.volumes)
    if instance.vm_state == "deleted":
        await check_no_volume(plane, root)
        assert await status_of(plane, data) == "available"


async def check_snapshots(plane: Plane, instance: Instance, succeeded: bool) -> None:
    rows = await plane.control.store.read("SELECT status FROM volume_snapshots")
    images = await plane.control.store.read(
        "SELECT status FROM images WHERE instance_id = :id AND deleted_at IS NULL", {"id": instance.id}
    )
    assert [row["status"] for row in rows] == (["available"] * 2 if succeeded else [])
    assert [row["status"] for row in images] == (["active"] if succeeded else [])
