"""Rebuild: rebuilding → rebuild_block_device_mapping → rebuild_spawning → active, or stopped where it was stopped.

The root disk is made anew from an image; id, host, ports, addresses, volumes and flavor stay. The old disk is kept until
the guest runs with the new one, so that a failure gives back what was there. The same of a root that is a volume.
"""

from __future__ import annotations

import msgspec

from instar.engine.run import Run
from instar.lifecycle import volumes
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import EPHEMERAL, ROOT, SWAP, disks_of, guest_of, host_of
from instar.lifecycle.root_volume import forget_old_root, replace_root_volume
from instar.lifecycle.start_guest import start_guest
from instar.model.guest import DiskDefinition, ImageSource
from instar.model.instance import Instance, InstanceSpec, SpecImage
from instar.model.network import InstancePort
from instar.model.states import PowerState, TaskState, VmState

KEPT = "kept"  # what a driver appends to the name of a disk that it keeps


class RebuildArguments(msgspec.Struct, frozen=True):
    """`spec` is what the instance is to be like: image, metadata, key, user data; its flavor and ports do not change.

    One that boots from a volume has no image of its own: `volume_image_id` is that of its root volume's new data, None
    leaves it as it is."""

    image: SpecImage | None
    spec: InstanceSpec
    name: str
    preserve_ephemeral: bool = False
    hostname: str | None = None  # None leaves it
    volume_image_id: str | None = None


async def rebuild(run: Run, cloud: Cloud) -> None:
    """Raises ImageGone; the instance is as before then."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=RebuildArguments)
    instance, host, hosts = run.instance, host_of(run.instance), run.hosts
    hostname = arguments.hostname or instance.hostname
    rebuilt = msgspec.structs.replace(
        instance, name=arguments.name, hostname=hostname, spec=rebuilt_spec(instance.spec, arguments)
    )
    source = await _source(run, cloud, host, arguments)
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id)
    await _stop(run, host, ports)
    if arguments.volume_image_id is not None:
        connected = await replace_root_volume(run, cloud, host, arguments.volume_image_id)
        rebuilt = volumes.with_volumes(rebuilt, connected)
    disks = disks_of(rebuilt, source)
    replaced = [disk for disk in disks if _is_replaced(disk, arguments)]
    for disk in replaced:
        await run.step(f"keep old {disk.name} disk", hosts.ensure_disk_kept, host, disk.name,
                       undo=hosts.ensure_disk_restored, task=TaskState.REBUILD_BLOCK_DEVICE_MAPPING)  # fmt: skip
        await run.step(f"create {disk.name} disk", hosts.ensure_disk, host, disk, undo=hosts.ensure_disk_unmade)
    # A step: after a crash further on, the record has the new image already.
    old = await run.step("note old image", spec_of, instance, on="database")
    await run.step("take new image", run.change_spec, lambda spec: rebuilt_spec(spec, arguments),
                   undo=lambda *_: run.change_spec(lambda spec: _as_it_was(spec, old)),
                   task=TaskState.REBUILD_SPAWNING, on="database")  # fmt: skip
    power_state = PowerState.SHUTDOWN
    if instance.vm_state is not VmState.STOPPED:
        power_state = await start_guest(run, host, guest_of(rebuilt, disks, ports), undo=hosts.ensure_not_running)
    run.keep()
    for disk in replaced:
        await run.step(f"remove old {disk.name} disk", hosts.ensure_no_disk, host, disk.name + KEPT)
    if arguments.volume_image_id is not None:
        run.note(facts={"volumes": rebuilt.facts.volumes})
        await forget_old_root(run, cloud, arguments.volume_image_id)
    run.note(name=arguments.name, hostname=hostname, facts={"ports": ports})
    ends = VmState.STOPPED if instance.vm_state is VmState.STOPPED else VmState.ACTIVE
    await run.settle(ends, power_state=power_state)


async def _source(run: Run, cloud: Cloud, host: str, arguments: RebuildArguments) -> ImageSource | None:
    """What the root disk is made of; None for one that boots from a volume. Raises ImageGone."""
    image_id = arguments.volume_image_id or (arguments.image.id if arguments.image is not None else None)
    if image_id is None:
        return None
    source = await run.step("find image", cloud.images.image_source, image_id, on="image",
                            deadline_s=cloud.settings.lifecycle.data_move_max_s)  # fmt: skip
    if arguments.image is None:
        return None
    await run.step("fetch image", run.hosts.ensure_image, host, source)
    return source


async def _stop(run: Run, host: str, ports: tuple[InstancePort, ...]) -> None:
    """At once: what the guest has in memory is of no use any more. Undone: it runs again, if it ran."""
    guest = guest_of(run.instance, disks_of(run.instance, None), ports)
    undo = run.hosts.start_again if run.instance.vm_state is VmState.ACTIVE else None
    await run.step("stop guest", run.hosts.ensure_stopped, host, 0.0, guest, undo=undo)


def _is_replaced(disk: DiskDefinition, arguments: RebuildArguments) -> bool:
    return disk.name in (ROOT, SWAP) or (disk.name == EPHEMERAL and not arguments.preserve_ephemeral)


def rebuilt_spec(spec: InstanceSpec, arguments: RebuildArguments) -> InstanceSpec:
    """What a rebuild changes of the spec; what the API changed meanwhile stays."""
    new = arguments.spec
    return msgspec.structs.replace(
        spec, image=arguments.image or spec.image, metadata=new.metadata, key_name=new.key_name, key_public=new.key_public,
        user_data=new.user_data, personality=new.personality, description=new.description,
        disk_config=new.disk_config, access_ip_v4=new.access_ip_v4, access_ip_v6=new.access_ip_v6,
        trusted_image_certificates=new.trusted_image_certificates,
    )  # fmt: skip


async def spec_of(instance: Instance) -> InstanceSpec:
    return instance.spec


def _as_it_was(spec: InstanceSpec, old: InstanceSpec) -> InstanceSpec:
    return rebuilt_spec(spec, RebuildArguments(image=old.image, spec=old, name=""))
