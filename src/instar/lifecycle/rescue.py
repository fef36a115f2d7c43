"""Rescue and unrescue: rescuing → rescued, unrescuing → active.

The guest boots from a disk of the rescue image; its own disks are there beside it, to be repaired, and untouched by us.
"""

from __future__ import annotations

import msgspec

from instar.engine.run import Run
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import RESCUE, disks_of, guest_of, host_of
from instar.lifecycle.start_guest import start_guest
from instar.model.guest import DiskDefinition
from instar.model.instance import Instance, RescueDisk
from instar.model.network import InstancePort
from instar.model.states import PowerState, VmState


class RescueArguments(msgspec.Struct, frozen=True):
    image_id: str


async def rescue(run: Run, cloud: Cloud) -> None:
    """Raises ImageGone; the guest runs as before then."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=RescueArguments)
    instance, host, hosts = run.instance, host_of(run.instance), run.hosts
    source = await run.step("find image", cloud.images.image_source, arguments.image_id, on="image",
                            deadline_s=cloud.settings.lifecycle.data_move_max_s)  # fmt: skip
    await run.step("fetch image", hosts.ensure_image, host, source)
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id)
    await _stop(run, cloud, host, ports)
    disk = DiskDefinition(RESCUE, source.virtual_size_bytes, source)
    await run.step("create rescue disk", hosts.ensure_disk, host, disk, undo=hosts.ensure_disk_unmade)
    rescued = RescueDisk(arguments.image_id, source.virtual_size_bytes)
    state = await _start(run, _with(instance, rescued), host, ports)
    run.note(facts={"rescue": rescued})
    await run.settle(VmState.RESCUED, power_state=state)


async def unrescue(run: Run, cloud: Cloud) -> None:
    instance, host = run.instance, host_of(run.instance)
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id)
    await _stop(run, cloud, host, ports)
    state = await _start(run, _with(instance, None), host, ports)
    run.keep()
    run.note(facts={"rescue": None})
    await run.step("remove rescue disk", run.hosts.ensure_no_disk, host, RESCUE)
    await run.settle(VmState.ACTIVE, power_state=state)


async def _stop(run: Run, cloud: Cloud, host: str, ports: tuple[InstancePort, ...]) -> None:
    """Undone: the guest runs as it did, if it did."""
    grace_s = cloud.settings.lifecycle.shutdown_grace_s
    guest = guest_of(run.instance, disks_of(run.instance, None), ports)
    ran = run.instance.vm_state in (VmState.ACTIVE, VmState.RESCUED)
    await run.step("stop guest", run.hosts.ensure_stopped, host, grace_s, guest,
                   undo=run.hosts.start_again if ran else None, deadline_s=grace_s + 60)  # fmt: skip


async def _start(run: Run, instance: Instance, host: str, ports: tuple[InstancePort, ...]) -> PowerState:
    guest = guest_of(instance, disks_of(instance, None), ports)
    return await start_guest(run, host, guest, undo=run.hosts.ensure_not_running)


def _with(instance: Instance, rescued: RescueDisk | None) -> Instance:
    return msgspec.structs.replace(instance, facts=msgspec.structs.replace(instance.facts, rescue=rescued))
