"""Attach, detach and swap volumes of an instance. None of them has a task_state.

The volume that comes was reserved when the request was accepted (`devices.py`); it is given back when the operation fails,
also where it fails before its first step. An instance that is on no host has its volumes only reserved: they are connected
when it is unshelved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
import structlog

from instar.engine.run import Run
from instar.errors import HOST_AWAY, HypervisorError, InstarError, VolumeFailed
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import disks_of, guest_of, host_of, volume_disk
from instar.lifecycle.device_names import free_device, local_devices
from instar.lifecycle.volumes import with_volumes
from instar.model.guest import GuestDefinition
from instar.model.instance import Instance, InstanceVolume
from instar.model.volume import VolumeConnection, VolumeDisk

log = structlog.get_logger()

ASK_AGAIN_S = 0.5


class VolumeArguments(msgspec.Struct, frozen=True):
    """Of an attach: the volume that comes; of a detach: the one that goes. Both without their connection."""

    volume: InstanceVolume


class SwapArguments(msgspec.Struct, frozen=True):
    old: InstanceVolume
    new: InstanceVolume


def took_volume(cloud: Cloud, run: Run) -> None:
    """An attach: its volume was reserved when it was accepted."""
    volume = msgspec.msgpack.decode(run.operation.arguments, type=VolumeArguments).volume
    run.took("reserve volume", cloud.volumes.detach, volume.attachment_id, on="volume")


def took_new_volume(cloud: Cloud, run: Run) -> None:
    """A swap: the new volume was reserved when it was accepted."""
    volume = msgspec.msgpack.decode(run.operation.arguments, type=SwapArguments).new
    run.took("reserve volume", cloud.volumes.detach, volume.attachment_id, on="volume")


async def attach(run: Run, cloud: Cloud) -> None:
    volume = msgspec.msgpack.decode(run.operation.arguments, type=VolumeArguments).volume
    others = without(run.facts.volumes, volume)
    await run.step("reserve volume", reserve, cloud, volume, run.instance.id, on="volume")
    try:
        if run.instance.host is None:
            run.note(facts={"volumes": (*others, volume)})
        else:
            await _attach_on(run, cloud, run.instance.host, volume, others)
    except InstarError:
        run.note(facts={"volumes": others})
        raise
    await run.settle()


async def _attach_on(
    run: Run, cloud: Cloud, host: str, volume: InstanceVolume, others: tuple[InstanceVolume, ...]
) -> None:
    connection = await run.step("connect volume", connect, cloud, volume, host, on="volume")
    connected = msgspec.structs.replace(volume, connection=connection)
    guest = _guest_with(run.instance, (*others, connected))
    await run.step("attach to guest", run.hosts.ensure_volume_attached, host, guest, volume.volume_id,
                   undo=run.hosts.ensure_volume_not_attached)  # fmt: skip
    # Before the volume is seen to be in use: who reads that finds the server to have it.
    run.note(facts={"volumes": (*others, connected)})
    await run.step("complete attachment", cloud.volumes.complete, volume.attachment_id)


async def detach(run: Run, cloud: Cloud) -> None:
    """Until the guest has let go of the volume everything can be put back; from then on it is gone."""
    volume = msgspec.msgpack.decode(run.operation.arguments, type=VolumeArguments).volume
    host = run.instance.host
    if host is not None:
        guest = _guest_with(run.instance, run.facts.volumes)
        await run.step("mark detaching", mark_detaching, cloud, volume, undo=unmark_detaching, on="volume")
        await run.step("detach from guest", run.hosts.ensure_volume_detached, host, volume.volume_id,
                       undo=lambda on, volume_id: run.hosts.ensure_volume_attached(on, guest, volume_id))  # fmt: skip
    run.keep()
    run.note(facts={"volumes": without(run.facts.volumes, volume)})
    # What undoes this is to do it: the guest has let go of it already.
    await run.step("detach volume", cloud.volumes.detach, volume.attachment_id, undo=cloud.volumes.detach)
    await run.settle()


async def swap(run: Run, cloud: Cloud) -> None:
    """The guest goes on with the new volume, on which the data of the old one is."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=SwapArguments)
    old, new, host = arguments.old, arguments.new, run.instance.host
    assert host is not None, "only a guest that runs swaps its volumes"
    await run.step("reserve volume", reserve_alone, cloud, new, run.instance.id, on="volume")
    connection = await run.step("connect volume", connect, cloud, new, host, on="volume")
    old_connection = await run.step("read old connection", connect, cloud, old, host, on="volume")
    connected = msgspec.structs.replace(new, connection=connection)
    back = volume_disk(msgspec.structs.replace(old, connection=old_connection), run.instance)
    # Whoever else wrote to one of them meanwhile would not find it on the other.
    await run.step("mark detaching", mark_detaching_alone, cloud, old, undo=unmark_detaching, on="volume")
    await _copy(run, cloud, old, connected, back)
    run.keep()
    run.note(facts={"volumes": tuple(connected if one.attachment_id == old.attachment_id else one
                                     for one in run.facts.volumes)})  # fmt: skip
    # What undoes these is to do them: the guest is on the new volume already.
    await run.step("complete attachment", complete, cloud, new, undo=partial(_end_swap, old=old), on="volume")
    await run.step("detach volume", cloud.volumes.detach, old.attachment_id, undo=cloud.volumes.detach)
    await run.settle()


async def _copy(run: Run, cloud: Cloud, old: InstanceVolume, new: InstanceVolume, back: VolumeDisk) -> None:
    """The guest is on the new volume. Raises what went wrong: then it is on the old one, or nobody knows."""
    limit_s, patience_s = cloud.settings.lifecycle.data_move_max_s, cloud.settings.host.down_after_s
    host = host_of(run.instance)

    async def onto_old(host: str, *_: object) -> None:
        await run.hosts.swap_volume(host, new.volume_id, back, limit_s)

    try:
        await run.step("copy to new volume", run.hosts.swap_volume, host, old.volume_id, volume_disk(new, run.instance),
                       limit_s, deadline_s=limit_s + 60, undo=onto_old)  # fmt: skip
    except HOST_AWAY as error:
        # Which of the two the guest is on only the host knows: nothing is taken from it before that is clear.
        if await run.step("find volume of guest", _until_clear, host, onto_old, patience_s, on="compute",
                          deadline_s=patience_s + limit_s + 60):  # fmt: skip
            raise
        await _keep_both(run, cloud, old, new, error)


async def _until_clear(host: str, onto_old: Callable[[str], Awaitable[None]], patience_s: float) -> bool:
    """The guest is on the old volume, as it was. False: its host has not told in time, or the guest is gone meanwhile."""
    ends_at = time.monotonic() + patience_s
    while True:
        try:
            await onto_old(host)
            return True
        except HOST_AWAY:
            if time.monotonic() > ends_at:
                return False
        except HypervisorError:
            return False
        await asyncio.sleep(ASK_AGAIN_S)


async def _keep_both(
    run: Run, cloud: Cloud, old: InstanceVolume, connected: InstanceVolume, error: InstarError
) -> None:
    """The host was lost with the guest on either of them: both stay the instance's, and are served wherever it starts."""
    run.keep()
    beside = msgspec.structs.replace(connected, boot_index=None, device=_free_device(run, connected.bus))
    run.note(facts={"volumes": (*run.facts.volumes, beside)})
    await run.step("keep new volume", complete, cloud, beside, undo=complete, on="volume")
    await run.step("keep old volume", unmark_detaching, cloud, old, undo=unmark_detaching, on="volume")
    log.warning("volume.swap_unclear", instance=run.instance.id, old=old.volume_id, new=connected.volume_id)
    raise VolumeFailed(
        volume_id=old.volume_id,
        reason=f"it may have been swapped for {connected.volume_id} or not when the host was lost ({error.user_message}) "
        "Both volumes stay attached: look which has the newer data, and detach the other",
    )


def _free_device(run: Run, bus: str) -> str:
    """The first name that no disk of the instance has. Raises Conflict."""
    volumes = run.facts.volumes
    booted = any(volume.boot_index == 0 for volume in volumes)
    local = local_devices(run.instance.spec, bus, boots_from_volume=booted)
    return free_device({volume.device for volume in volumes} | local, bus)


async def complete(cloud: Cloud, volume: InstanceVolume) -> None:
    await cloud.volumes.complete(volume.attachment_id)


async def _end_swap(cloud: Cloud, new: InstanceVolume, *, old: InstanceVolume) -> None:
    await complete(cloud, new)
    await cloud.volumes.detach(old.attachment_id)


def without(volumes: Sequence[InstanceVolume], gone: InstanceVolume) -> tuple[InstanceVolume, ...]:
    return tuple(one for one in volumes if one.attachment_id != gone.attachment_id)


def _guest_with(instance: Instance, volumes: tuple[InstanceVolume, ...]) -> GuestDefinition:
    """The guest as its host defines it, with these volumes."""
    changed = with_volumes(instance, volumes)
    return guest_of(changed, disks_of(changed, None), instance.facts.ports)


async def reserve(cloud: Cloud, volume: InstanceVolume, instance_id: str) -> None:
    await cloud.volumes.reserve(volume.attachment_id, volume.volume_id, instance_id=instance_id)


async def reserve_alone(cloud: Cloud, volume: InstanceVolume, instance_id: str) -> None:
    await cloud.volumes.reserve(volume.attachment_id, volume.volume_id, instance_id=instance_id, alone=True)


async def connect(cloud: Cloud, volume: InstanceVolume, host: str) -> VolumeConnection:
    return await cloud.volumes.connect(
        volume.attachment_id, host=host, host_ip=cloud.scheduler.address_of(host), device=f"/dev/{volume.device}"
    )


async def mark_detaching(cloud: Cloud, volume: InstanceVolume) -> None:
    await cloud.volumes.mark_detaching(volume.attachment_id, detaching=True)


async def mark_detaching_alone(cloud: Cloud, volume: InstanceVolume) -> None:
    await cloud.volumes.mark_detaching(volume.attachment_id, detaching=True, alone=True)


async def unmark_detaching(cloud: Cloud, volume: InstanceVolume) -> None:
    await cloud.volumes.mark_detaching(volume.attachment_id, detaching=False)
