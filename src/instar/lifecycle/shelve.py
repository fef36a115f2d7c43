"""Shelve, offload, unshelve (LIFECYCLE section 4).

Shelve: the guest is shut down (one that is paused or suspended only at the end, so that its memory is there if the upload
fails), its root disk becomes an image, and the instance leaves its host at once, after a time, or never. Offload: the host
forgets the guest; ports and volumes stay the instance's. Unshelve: started where it is, or made anew from the image on
whichever host has room, with the same id, addresses and volumes.
"""

from __future__ import annotations

import msgspec
import structlog

from instar.clock import iso, now_us
from instar.engine.hosts import tell_leftovers
from instar.engine.run import Run
from instar.errors import HOST_AWAY, InstarError
from instar.lifecycle import volumes
from instar.lifecycle.build import scheduling_request
from instar.lifecycle.candidates import WORTH_ANOTHER_HOST, Refusals
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import boots_from_volume, claimed_flavor, disks_of, guest_of, host_of
from instar.lifecycle.ids import new_id
from instar.lifecycle.ports import bind_ports_back, bind_ports_to
from instar.lifecycle.snapshot import SnapshotArguments, draft_of, upload_root
from instar.lifecycle.start_guest import set_up_ports, start_guest, start_on_ports
from instar.model.guest import ImageSource
from instar.model.instance import SHELVED_AT, SHELVED_HOST, SHELVED_IMAGE
from instar.model.states import PowerState, TaskState, VmState

log = structlog.get_logger()


class UnshelveArguments(msgspec.Struct, frozen=True):
    """`availability_zone`: "" unpins it (2.91), None leaves it as it is."""

    availability_zone: str | None = None
    host: str | None = None


async def shelve(run: Run, cloud: Cloud) -> None:
    instance, host = run.instance, host_of(run.instance)
    guest = guest_of(instance, disks_of(instance, None), run.facts.ports)
    grace_s = cloud.settings.lifecycle.shutdown_grace_s
    if instance.vm_state is VmState.ACTIVE:
        await run.step("stop guest", run.hosts.ensure_stopped, host, grace_s, guest,
                       undo=run.hosts.start_again, deadline_s=grace_s + 60)  # fmt: skip
    marks = {SHELVED_AT: iso(now_us()), SHELVED_HOST: host}
    if not boots_from_volume(instance):
        image_id = await run.step("choose image id", new_id)
        draft = draft_of(instance, SnapshotArguments(image_id, f"{instance.name}-shelved"))
        await upload_root(run, cloud, image_id, draft,
                          TaskState.SHELVING_IMAGE_PENDING_UPLOAD, TaskState.SHELVING_IMAGE_UPLOADING)  # fmt: skip
        marks[SHELVED_IMAGE] = image_id
    if instance.vm_state in (VmState.PAUSED, VmState.SUSPENDED):
        await run.step("end guest", run.hosts.ensure_stopped, host, 0.0)
    run.keep()
    run.note(facts={"system_metadata": {**run.facts.system_metadata, **marks}})
    if cloud.settings.lifecycle.shelved_offload_s != 0 and not boots_from_volume(instance):
        await run.settle(VmState.SHELVED, power_state=PowerState.SHUTDOWN)
        return
    run.failed_state = VmState.SHELVED  # its image is there: what may fail now is only that it leaves its host
    await _leave_host(run, cloud, host)
    await run.settle(VmState.SHELVED_OFFLOADED, power_state=PowerState.SHUTDOWN)


async def shelve_offload(run: Run, cloud: Cloud) -> None:
    await _leave_host(run, cloud, host_of(run.instance))
    await run.settle(VmState.SHELVED_OFFLOADED, power_state=PowerState.SHUTDOWN)


async def _leave_host(run: Run, cloud: Cloud, host: str) -> None:
    """Nothing of the instance is on the host. One that is away does not hold it up: it is cleaned when it comes back."""
    instance = run.instance
    try:
        await run.step("remove guest", run.hosts.ensure_absent, host, task=TaskState.SHELVING_OFFLOADING)
    except HOST_AWAY as error:
        log.warning("shelve.host_away", instance=instance.id, host=host, reason=error.message)
        await tell_leftovers(cloud.bus, host)
    await run.step("unbind ports", cloud.networks.unbind, instance.id)
    await volumes.leave_host(run, cloud)
    await run.step("release claims", cloud.scheduler.release_instance, instance.id)
    run.note(host=None, availability_zone=instance.spec.availability_zone)


async def unshelve(run: Run, cloud: Cloud) -> None:
    """Raises NoValidHost, ImageGone; the instance stays shelved then."""
    if run.instance.vm_state is VmState.SHELVED:
        await _start_where_it_is(run, cloud)
    else:
        await _place_anew(run, cloud)


async def _start_where_it_is(run: Run, cloud: Cloud) -> None:
    instance, host = run.instance, host_of(run.instance)
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id, task=TaskState.POWERING_ON)
    guest = guest_of(instance, disks_of(instance, None), ports)
    state = await start_guest(run, host, guest, undo=run.hosts.ensure_not_running)
    await _forget_shelving(run, cloud)
    await run.settle(VmState.ACTIVE, power_state=state)


async def _place_anew(run: Run, cloud: Cloud) -> None:
    instance = run.instance
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=UnshelveArguments)
    zone = instance.spec.availability_zone if arguments.availability_zone is None else arguments.availability_zone or None
    request = msgspec.structs.replace(
        scheduling_request(run), availability_zone=zone, requested_host=arguments.host, exclude_hosts=()
    )
    selection = await run.step("select hosts", cloud.scheduler.candidates, request)
    refusals = Refusals()
    for host in selection.hosts:
        try:
            async with run.scope():
                await _place_on(run, cloud, host, arguments)
            return
        except WORTH_ANOTHER_HOST as error:
            refusals.add(host, error)
    raise refusals.no_valid_host(selection.details)


async def _place_on(run: Run, cloud: Cloud, host: str, arguments: UnshelveArguments) -> None:
    instance, hosts = run.instance, run.hosts
    await run.step("claim", cloud.scheduler.claim, f"{run.operation.id}:{host}", instance.id, host,
                   claimed_flavor(instance), undo=cloud.scheduler.release)  # fmt: skip
    ports = await run.step("bind ports", bind_ports_to, cloud, instance, host, "",
                           undo=bind_ports_back, task=TaskState.SPAWNING, on="network")  # fmt: skip
    connected = await volumes.connect_all(run, cloud, host)
    moved = volumes.with_volumes(instance, connected)
    plugged = tuple(port.definition for port in ports)
    await set_up_ports(run, host, plugged, undo=hosts.ensure_no_ports)
    # Late, as it may take a moment: an image that was made just now is being read for its SHA-256.
    source = None if boots_from_volume(instance) else await _find_image(run, cloud)
    disks = disks_of(moved, source)
    if source is not None:
        await run.step("fetch image", hosts.ensure_image, host, source)
    for disk in disks:
        await run.step(f"create {disk.name} disk", hosts.ensure_disk, host, disk, undo=hosts.ensure_no_disks)
    guest = guest_of(moved, disks, ports)
    state = await start_on_ports(run, host, guest, undo=hosts.undo_of_running(disks))
    if arguments.availability_zone is not None:
        zone = arguments.availability_zone or None
        await run.step("pin zone", run.change_spec, lambda spec: msgspec.structs.replace(spec, availability_zone=zone))
    run.keep()
    run.note(host=host, availability_zone=cloud.scheduler.zone_of(host), launched_at=now_us(),
             facts={"ports": ports, "volumes": connected})  # fmt: skip
    await _forget_shelving(run, cloud)
    await run.settle(VmState.ACTIVE, power_state=state)


async def _find_image(run: Run, cloud: Cloud) -> ImageSource:
    """Raises ImageGone."""
    image_id = run.instance.facts.system_metadata.get(SHELVED_IMAGE, "")
    limit_s = cloud.settings.lifecycle.data_move_max_s
    return await run.step("find image", cloud.images.image_source, image_id, on="image", deadline_s=limit_s)


async def _forget_shelving(run: Run, cloud: Cloud) -> None:
    """The guest runs: its shelved image has done its work. One that cannot be deleted now is no reason to fail."""
    metadata = dict(run.facts.system_metadata)
    image_id = metadata.pop(SHELVED_IMAGE, None)
    metadata.pop(SHELVED_AT, None)
    metadata.pop(SHELVED_HOST, None)
    if image_id:
        try:
            await run.step("delete shelved image", cloud.images.discard, image_id, on="image")
        except InstarError as error:
            log.warning("unshelve.image_left", instance=run.instance.id, image=image_id, reason=error.message)
    run.note(facts={"system_metadata": metadata})
