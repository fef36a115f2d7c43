"""What moves of an instance mean for its volumes: they are reached from the new host, and let go by the old one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from instar.engine.run import Run
from instar.lifecycle.cloud import Cloud
from instar.model.instance import Instance, InstanceVolume
from instar.model.volume import VolumeConnection


async def connect_all(run: Run, cloud: Cloud, host: str) -> tuple[InstanceVolume, ...]:
    """Every volume of the instance, with what the host needs to reach it: one step for each. Undone: on no host."""
    connected = []
    for volume in run.facts.volumes:
        connection = await run.step(
            f"connect volume {volume.device}", connect, cloud, volume, host, undo=disconnect, on="volume"
        )
        connected.append(msgspec.structs.replace(volume, connection=connection))
    return tuple(connected)


async def leave_host(run: Run, cloud: Cloud) -> None:
    """The volumes stay the instance's, and are on no host. They are noted so."""
    for volume in run.facts.volumes:
        await run.step(f"disconnect volume {volume.device}", disconnect, cloud, volume, on="volume")
    run.note(facts={"volumes": without_connection(run.facts.volumes)})


def ends_with_instance(instance: Instance, volume: InstanceVolume) -> bool:
    """Whether the volume is deleted with the instance: what was said last counts."""
    return instance.spec.ends_volumes.get(volume.volume_id, volume.delete_on_termination)


def without_connection(volumes: Sequence[InstanceVolume]) -> tuple[InstanceVolume, ...]:
    return tuple(msgspec.structs.replace(volume, connection=None) for volume in volumes)


async def connect(cloud: Cloud, volume: InstanceVolume, host: str) -> VolumeConnection:
    connection = await cloud.volumes.connect(
        volume.attachment_id, host=host, host_ip=cloud.scheduler.address_of(host), device=f"/dev/{volume.device}"
    )
    await cloud.volumes.complete(volume.attachment_id)
    return connection


async def disconnect(cloud: Cloud, volume: InstanceVolume, *_: object) -> None:
    await cloud.volumes.detach(volume.attachment_id, keep_reservation=True)
