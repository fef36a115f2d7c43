"""A rebuild of an instance that boots from a volume: the volume gets an image's data, and stays the same volume.

What it had is kept by the volume service until the guest runs with the new data. Meanwhile no host may have it open.
"""

from __future__ import annotations

import msgspec
import structlog

from instar.engine.run import Run
from instar.errors import Cancelled, Conflict, InstarError, LeaseLost, TaskStateConflict
from instar.lifecycle import volumes
from instar.lifecycle.cloud import Cloud
from instar.model.instance import Instance, InstanceVolume
from instar.model.states import TaskState

log = structlog.get_logger()

ATTEMPTS_MAX = 3


async def replace_root_volume(run: Run, cloud: Cloud, host: str, image_id: str) -> tuple[InstanceVolume, ...]:
    """The guest is off. The instance's volumes, the root with fresh information of its connection."""
    root, limit_s = root_volume(run.instance), cloud.settings.lifecycle.data_move_max_s
    turn = run.operation.id

    async def replace() -> None:
        await cloud.volumes.reimage(root.volume_id, image_id, turn=turn, deadline_s=limit_s)

    async def give_back() -> None:
        await cloud.volumes.reimage_undo(root.volume_id, turn=turn, deadline_s=limit_s)

    async def connect_again(cloud: Cloud, volume: InstanceVolume) -> None:
        await volumes.connect(cloud, volume, host)

    await run.step(f"disconnect volume {root.device}", volumes.disconnect, cloud, root, undo=connect_again,
                   on="volume", task=TaskState.REBUILD_BLOCK_DEVICE_MAPPING)  # fmt: skip
    await run.step(f"reimage volume {root.device}", replace, undo=give_back, on="volume", deadline_s=limit_s + 60)
    connection = await run.step(f"connect volume {root.device}", volumes.connect, cloud, root, host,
                                undo=volumes.disconnect, on="volume")  # fmt: skip
    fresh = msgspec.structs.replace(root, connection=connection)
    return tuple(fresh if one is root else one for one in run.instance.facts.volumes)


async def forget_old_root(run: Run, cloud: Cloud, image_id: str) -> None:
    """The guest runs with the new data. What is kept and cannot be removed now goes with the next one, or the volume."""
    root, limit_s = root_volume(run.instance), cloud.settings.lifecycle.data_move_max_s

    async def end() -> None:
        await cloud.volumes.reimage_end(root.volume_id, image_id, deadline_s=limit_s)

    for _ in range(ATTEMPTS_MAX):
        try:
            return await run.step(f"remove old data of volume {root.device}", end, on="volume")
        except (Cancelled, LeaseLost, TaskStateConflict):
            raise
        except InstarError as error:
            log.warning("rebuild.old_data_left", instance=run.instance.id, volume=root.volume_id, reason=error.message)
    return None


def root_volume(instance: Instance) -> InstanceVolume:
    """Raises Conflict where it does not boot from a volume that it has."""
    for volume in instance.facts.volumes:
        if volume.boot_index == 0:
            return volume
    raise Conflict(f"Instance {instance.id} has no root volume.")
