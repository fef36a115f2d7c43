"""The volumes of an instance that is built: made where they are new, reserved, and reached from its host.

What the build made is deleted when it is undone; what was there before is only given back.
"""

from __future__ import annotations

import structlog

from instar.engine.run import Run
from instar.errors import Conflict
from instar.lifecycle import volumes
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.device_names import volume_bus
from instar.model.instance import Instance, InstanceVolume, RequestedVolume
from instar.model.states import TaskState
from instar.model.volume import VolumeConnection
from instar.volumes.contract import VolumeInfo

log = structlog.get_logger()


def took_volumes(cloud: Cloud, run: Run) -> None:
    """A build: volumes that are there already were reserved when it was accepted."""
    for wanted in run.instance.spec.volumes:
        if not wanted.create:
            run.took("reserve volume", cloud.volumes.detach, wanted.attachment_id, on="volume")


async def volumes_of_build(run: Run, cloud: Cloud, host: str) -> tuple[InstanceVolume, ...]:
    """Raises VolumeFailed, QuotaExceeded, BadRequest (a source that is gone), VolumeUnusable, StepTimeout."""
    limit_s = cloud.settings.lifecycle.data_move_max_s
    found = []
    for wanted in run.instance.spec.volumes:
        if wanted.create:
            await run.step("create volume", create_volume, cloud, run.instance, wanted,
                           undo=delete_volume, task=TaskState.BLOCK_DEVICE_MAPPING, on="volume")  # fmt: skip
        info = await run.step("wait for volume", until_available, cloud, wanted, limit_s, on="volume",
                              task=TaskState.BLOCK_DEVICE_MAPPING, deadline_s=limit_s + 60)  # fmt: skip
        await run.step("reserve volume", reserve_volume, cloud, run.instance, wanted, undo=leave_volume, on="volume")
        connection = await run.step("connect volume", connect_volume, cloud, run.instance, wanted, host, on="volume")
        found.append(_instance_volume(run.instance, wanted, info, connection))
    return tuple(found)


def _instance_volume(
    instance: Instance, wanted: RequestedVolume, info: VolumeInfo, connection: VolumeConnection | None
) -> InstanceVolume:
    assert wanted.device is not None, "every volume gets a device's name before its build is accepted"
    return InstanceVolume(
        volume_id=wanted.volume_id,
        attachment_id=wanted.attachment_id,
        device=wanted.device,
        boot_index=wanted.boot_index,
        delete_on_termination=wanted.delete_on_termination,
        tag=wanted.tag,
        bus=wanted.bus or volume_bus(instance.spec),
        multiattach=info.multiattach,
        size_gib=info.size_gib,
        connection=connection,
    )


async def create_volume(cloud: Cloud, instance: Instance, wanted: RequestedVolume) -> None:
    await cloud.volumes.create(
        wanted.volume_id,
        project_id=instance.project_id,
        user_id=instance.user_id,
        size_gib=wanted.size_gib,
        name="",
        image_id=wanted.image_id,
        snapshot_id=wanted.snapshot_id,
        source_volume_id=wanted.source_volume_id,
        volume_type=wanted.volume_type,
        availability_zone=None,
    )


async def delete_volume(cloud: Cloud, _instance: Instance, wanted: RequestedVolume) -> None:
    """Undo: nothing of it is left."""
    await cloud.volumes.detach(wanted.attachment_id)
    try:
        await cloud.volumes.delete(wanted.volume_id)
    except Conflict as error:  # somebody made a snapshot of it meanwhile: then it is theirs to delete
        log.warning("build.volume_stays", volume=wanted.volume_id, reason=error.message)


async def until_available(cloud: Cloud, wanted: RequestedVolume, limit_s: float) -> VolumeInfo:
    return await cloud.volumes.until_available(wanted.volume_id, limit_s)


async def reserve_volume(cloud: Cloud, instance: Instance, wanted: RequestedVolume) -> None:
    await cloud.volumes.reserve(wanted.attachment_id, wanted.volume_id, instance_id=instance.id)


async def leave_volume(cloud: Cloud, _instance: Instance, wanted: RequestedVolume) -> None:
    """Undo: on no host. It stays reserved, for the next host or until the build is over."""
    await cloud.volumes.detach(wanted.attachment_id, keep_reservation=True)


async def connect_volume(cloud: Cloud, instance: Instance, wanted: RequestedVolume, host: str) -> VolumeConnection:
    volume = InstanceVolume(wanted.volume_id, wanted.attachment_id, wanted.device or "")
    return await volumes.connect(cloud, volume, host)
