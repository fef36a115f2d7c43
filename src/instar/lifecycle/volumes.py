"""What moves of an instance mean for its volumes: they are reached from the new host, and let go by the old one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import structlog

from instar.engine.run import Run
from instar.errors import Cancelled, InstarError, LeaseLost, TaskStateConflict, VolumeFailed
from instar.lifecycle.cloud import Cloud
from instar.model.instance import Instance, InstanceVolume
from instar.model.volume import VolumeConnection

log = structlog.get_logger()


async def connect_all(run: Run, cloud: Cloud, host: str) -> tuple[InstanceVolume, ...]:
    """Every volume of the instance, with what the host needs to reach it: one step for each. Undone: on no host."""
    connected = []
    for volume in run.facts.volumes:
        connection = await run.step(
            f"connect volume {volume.device}", connect, cloud, volume, host, undo=disconnect, on="volume"
        )
        connected.append(msgspec.structs.replace(volume, connection=connection))
    return tuple(connected)


async def connect_from(run: Run, cloud: Cloud, source: str, dest: str) -> tuple[InstanceVolume, ...]:
    """Every volume, reached from the new host as well: one step for each. Undone: as it was reached from the old one."""
    connected = []
    for volume in run.facts.volumes:
        connection = await run.step(
            f"connect volume {volume.device}", connect, cloud, volume, dest,
            undo=lambda cloud, volume, _dest: connect(cloud, volume, source), on="volume",
        )  # fmt: skip
        connected.append(msgspec.structs.replace(volume, connection=connection))
    return tuple(connected)


async def connected_anew(run: Run, cloud: Cloud, host: str) -> Instance:
    """The instance with fresh connections to its volumes, on the host where it is: one step for each."""
    volumes = tuple([await _anew(run, cloud, volume, host) for volume in run.instance.facts.volumes])
    return with_volumes(run.instance, volumes)


async def connected_where_possible(
    run: Run, cloud: Cloud, host: str
) -> tuple[Instance, tuple[InstanceVolume, ...], InstarError | None]:
    """As `connected_anew`, without the volumes that cannot be reached, which come second, and why the last of them
    cannot. The volume that is booted has to be reached."""
    found, lost, reason = [], [], None
    for volume in run.instance.facts.volumes:
        try:
            found.append(await _anew(run, cloud, volume, host))
        except (LeaseLost, Cancelled, TaskStateConflict):
            raise
        except InstarError as error:
            if volume.boot_index == 0:
                raise
            log.warning("volume.lost", instance=run.instance.id, volume=volume.volume_id, reason=error.message)
            lost.append(volume)
            reason = VolumeFailed(
                volume_id=volume.volume_id, reason=f"it could not be connected again and was detached: {error.user_message}"
            )
    return with_volumes(run.instance, tuple(found)), tuple(lost), reason


async def _anew(run: Run, cloud: Cloud, volume: InstanceVolume, host: str) -> InstanceVolume:
    connection = await run.step(f"connect volume {volume.device}", connect, cloud, volume, host, on="volume")
    return msgspec.structs.replace(volume, connection=connection)


def with_volumes(instance: Instance, volumes: tuple[InstanceVolume, ...]) -> Instance:
    """The instance as a guest with these volumes is defined from it."""
    return msgspec.structs.replace(instance, facts=msgspec.structs.replace(instance.facts, volumes=volumes))


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
