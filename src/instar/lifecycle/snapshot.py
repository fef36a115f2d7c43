"""createImage and createBackup: image_snapshot → image_pending_upload → image_uploading → as before.

The host writes the disk once, straight to where the image service keeps it; a running guest goes on meanwhile. A failure
leaves no image. An instance that is booted from a volume gets snapshots of its volumes, and an image without data that
names them.
"""

from __future__ import annotations

import json
import uuid

import msgspec
import structlog

from instar.engine.run import Run
from instar.errors import InstarError
from instar.images.contract import Image, ImageDraft
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import ROOT, boots_from_volume, host_of
from instar.lifecycle.volumes import ends_with_instance
from instar.model.guest import SnapshotTaken, SnapshotTarget
from instar.model.instance import Instance
from instar.model.states import TaskState

log = structlog.get_logger()

# What a server's own image has of its own; a copy of it must not claim to be it.
NOT_INHERITED = frozenset(
    {
        "image_type", "instance_uuid", "backup_type", "base_image_ref", "user_id", "image_location", "bdm_v2",
        "block_device_mapping", "root_device_name",
    }
)  # fmt: skip


class SnapshotArguments(msgspec.Struct, frozen=True):
    """`rotation` None: no backup. `backup_type` is any word of the user's, such as daily."""

    image_id: str
    name: str
    properties: dict[str, str] = {}
    backup_type: str | None = None
    rotation: int | None = None


async def create_image(run: Run, cloud: Cloud) -> None:
    """Both actions: a backup is an image that has a type, and older ones of that type give way to it."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=SnapshotArguments)
    draft = draft_of(run.instance, arguments)
    if boots_from_volume(run.instance):
        await _snapshot_volumes(run, cloud, arguments, draft)
    else:
        await upload_root(run, cloud, arguments.image_id, draft,
                          TaskState.IMAGE_PENDING_UPLOAD, TaskState.IMAGE_UPLOADING)  # fmt: skip
    if arguments.rotation is not None and arguments.backup_type is not None:
        await _rotate(run, cloud, arguments.backup_type, arguments.rotation)
    await run.settle()


async def upload_root(
    run: Run, cloud: Cloud, image_id: str, draft: ImageDraft, pending: TaskState, uploading: TaskState
) -> None:
    """The root disk, as it is now, becomes the image."""
    host, limit_s = host_of(run.instance), cloud.settings.lifecycle.data_move_max_s
    await run.step("queue image", queue_image, cloud, image_id, draft, undo=discard_image, on="image")
    location = await run.step("prepare upload", cloud.images.upload_target, image_id, task=pending, on="image")
    target = SnapshotTarget(image_id, location, draft.disk_format)
    await run.step("copy disk", take_snapshot, host, run, target, limit_s,
                   task=uploading, on="compute", deadline_s=limit_s + 60)  # fmt: skip
    await run.step("finish upload", finish_upload, cloud, image_id, on="image", deadline_s=limit_s)


async def queue_image(cloud: Cloud, image_id: str, draft: ImageDraft) -> None:
    await cloud.images.queue(image_id, draft)


async def discard_image(cloud: Cloud, image_id: str, *_: object) -> None:
    await cloud.images.discard(image_id)


async def finish_upload(cloud: Cloud, image_id: str) -> Image:
    return await cloud.images.finish_upload(image_id)


async def take_snapshot(host: str, run: Run, target: SnapshotTarget, limit_s: float) -> SnapshotTaken:
    return await run.hosts.take_snapshot(host, ROOT, target, limit_s)


def draft_of(instance: Instance, arguments: SnapshotArguments) -> ImageDraft:
    """The original image's properties, the user's own on top, and what says where this one is from, which nobody may fake:
    backups are counted and rotated by it."""
    original = instance.spec.image
    inherited = dict(original.properties) if original else {}
    properties = {name: value for name, value in inherited.items() if name not in NOT_INHERITED}
    properties |= {
        **arguments.properties,
        "base_image_ref": original.id if original else "",
        "instance_uuid": instance.id,
        "user_id": instance.user_id,
        "image_type": "backup" if arguments.rotation is not None else "snapshot",
        "image_location": "snapshot",
        "image_state": "available",
        "owner_id": instance.project_id,
    }
    properties.pop("backup_type", None)
    if arguments.backup_type is not None:
        properties["backup_type"] = arguments.backup_type
    from_image = original.min_disk_gib if original else 0
    return ImageDraft(
        name=arguments.name,
        project_id=instance.project_id,
        properties=properties,
        min_disk_gib=0 if boots_from_volume(instance) else instance.spec.flavor.root_gib or from_image,
        min_ram_mib=original.min_ram_mib if original else 0,
    )


async def _rotate(run: Run, cloud: Cloud, backup_type: str, rotation: int) -> None:
    """Those beyond `rotation` go, the oldest first. One that cannot be deleted does not make the backup fail."""
    images = await run.step("list backups", cloud.images.backups_of, run.instance.id, backup_type, on="image")
    for image_id in reversed(images[rotation:]):
        try:
            await run.step("delete old backup", cloud.images.discard, image_id, on="image")
        except InstarError as error:
            log.warning("backup.not_rotated", instance=run.instance.id, image=image_id, reason=error.message)


# --- servers that are booted from a volume ------------------------------------------------------------------------------


async def _snapshot_volumes(run: Run, cloud: Cloud, arguments: SnapshotArguments, draft: ImageDraft) -> None:
    """A snapshot of each volume, and an image without data that names them as its block devices."""
    volumes, limit_s = run.instance.facts.volumes, cloud.settings.lifecycle.data_move_max_s
    mapping = [
        {
            "source_type": "snapshot", "destination_type": "volume",
            "snapshot_id": snapshot_id_of(arguments.image_id, volume.volume_id), "boot_index": volume.boot_index,
            "delete_on_termination": ends_with_instance(run.instance, volume), "volume_size": volume.size_gib,
            "device_name": f"/dev/{volume.device}", "tag": volume.tag,
        }
        for volume in volumes
    ]  # fmt: skip
    properties = {**draft.properties, "bdm_v2": "True", "block_device_mapping": json.dumps(mapping)}
    await run.step("queue image", queue_image, cloud, arguments.image_id, draft, undo=discard_image, on="image")
    for volume in volumes:
        snapshot_id = snapshot_id_of(arguments.image_id, volume.volume_id)
        await run.step(f"snapshot volume {volume.device}", snapshot_volume, run, cloud, snapshot_id, volume.volume_id,
                       arguments.name, undo=forget_snapshot, on="volume", task=TaskState.IMAGE_PENDING_UPLOAD,
                       deadline_s=limit_s + 60)  # fmt: skip
    await run.step("activate image", cloud.images.activate_without_data, arguments.image_id, properties,
                   task=TaskState.IMAGE_UPLOADING, on="image")  # fmt: skip


def snapshot_id_of(image_id: str, volume_id: str) -> str:
    """The id of the snapshot that an image has of a volume: it follows from both, so that it is the same after a crash."""
    return str(uuid.uuid5(uuid.UUID(image_id), volume_id))


async def snapshot_volume(run: Run, cloud: Cloud, snapshot_id: str, volume_id: str, name: str) -> None:
    instance, limit_s = run.instance, cloud.settings.lifecycle.data_move_max_s
    await cloud.volumes.snapshot_create(
        snapshot_id, volume_id, project_id=instance.project_id, user_id=instance.user_id,
        name=f"snapshot for {name}", deadline_s=limit_s,
    )  # fmt: skip


async def forget_snapshot(_run: Run, cloud: Cloud, snapshot_id: str, *_: object) -> None:
    await cloud.volumes.snapshot_delete(snapshot_id)
