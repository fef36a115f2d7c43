"""Delete: whatever was in flight is unwound first (the engine sees to that), then guest, ports and claims are given back.

A host that cannot be reached does not hold up a delete: its leftovers are removed when it returns (reconcile.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from instar.clock import now_us
from instar.engine.hosts import tell_leftovers
from instar.engine.run import Run
from instar.errors import HOST_AWAY, Conflict
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.volumes import ends_with_instance
from instar.model.instance import SHELVED_IMAGE, InstanceVolume
from instar.model.move import MoveStatus
from instar.model.states import PowerState, VmState
from instar.store.instances import usage_give_back
from instar.store.moves import migrations_end

log = structlog.get_logger()


async def delete(run: Run, cloud: Cloud) -> None:
    # Read as a step: the operation that was taken over may have found or given back a host since this one was accepted.
    instance = await run.step("read instance", run.current_instance, on="database")
    hosts = {host for host in (instance.host, instance.facts.leaving, instance.maybe_on) if host}
    move = instance.facts.move
    if move is not None:  # it may have something on both, also where a revert came half way
        await _or_later(run, cloud, "remove what was kept", run.hosts.ensure_nothing_aside, move.source)
        hosts |= {move.source, move.dest}
    for host in sorted(hosts):
        await _or_later(run, cloud, "remove guest", run.hosts.ensure_absent, host)
    await run.step("release ports", cloud.networks.release, instance.id)
    for volume in instance.facts.volumes:
        ends = ends_with_instance(instance, volume)
        await run.step(f"let go of volume {volume.device}", let_go_of_volume, cloud, volume, ends, on="volume")
    await run.step("let go of reservations", let_go_of_reservations, cloud, instance.id, on="volume")
    image_id = instance.facts.system_metadata.get(SHELVED_IMAGE)
    if image_id:
        await run.step("delete shelved image", cloud.images.discard, image_id, on="image")
    await run.step("release claims", cloud.scheduler.release_instance, instance.id)
    run.note(deleted=1, terminated_at=now_us(), maybe_on=None)
    run.also(migrations_end(instance.id, MoveStatus.ERROR))
    await run.settle(VmState.DELETED, power_state=PowerState.NOSTATE, also=(usage_give_back(instance.id),))


async def _or_later(
    run: Run, cloud: Cloud, name: str, call: Callable[[str], Awaitable[None]], host: str
) -> None:
    try:
        await run.step(name, call, host)
    except HOST_AWAY as error:
        log.warning("delete.host_away", instance=run.instance.id, host=host, reason=error.message)
        await tell_leftovers(cloud.bus, host)


async def let_go_of_reservations(cloud: Cloud, instance_id: str) -> None:
    """Volumes that were still on their way to it."""
    for attachment in await cloud.volumes.attachments(instance_id):
        await cloud.volumes.detach(attachment.id)


async def let_go_of_volume(cloud: Cloud, volume: InstanceVolume, ends: bool) -> None:
    """It is nobody's again, or gone where it was to end with the instance."""
    await cloud.volumes.detach(volume.attachment_id)
    if ends:
        try:
            await cloud.volumes.delete(volume.volume_id)
        except Conflict as error:  # it has snapshots, or another instance: then it stays
            log.warning("delete.volume_stays", volume=volume.volume_id, reason=error.message)
