"""Create: scheduling → networking → block_device_mapping → spawning → active (LIFECYCLE, create).

A failure on a host gives everything on that host back and tries the next candidate. When none is left the instance is
in error, and its fault says why each host said no. A failure never leaks an address, a claim or a disk.
"""

from __future__ import annotations

from instar.clock import now_us
from instar.engine.run import Run
from instar.errors import InstarError
from instar.lifecycle.build_volumes import volumes_of_build
from instar.lifecycle.candidates import WORTH_ANOTHER_HOST, Refusals
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import boots_from_volume, claimed_flavor, disks_of, guest_of
from instar.lifecycle.start_guest import start_guest
from instar.lifecycle.volumes import with_volumes
from instar.model.network import InstancePort
from instar.model.states import TaskState, VmState
from instar.scheduling.scheduler import SchedulingRequest


async def build(run: Run, cloud: Cloud) -> None:
    """Find a host for the instance and start its guest there. Raises NoValidHost, ImageGone, NoFreeAddress, PortInUse."""
    selection = await run.step("select hosts", cloud.scheduler.candidates, scheduling_request(run))
    refusals = Refusals()
    for host in selection.hosts:
        try:
            async with run.scope():
                await _build_on(run, cloud, host)
            return
        except WORTH_ANOTHER_HOST as error:
            refusals.add(host, error)
            _note_nowhere(run)
        except InstarError:
            _note_nowhere(run)
            raise
    raise refusals.no_valid_host(selection.details)


def _note_nowhere(run: Run) -> None:
    """What the record says after an attempt that was undone: no host, no address."""
    run.note(host=None, availability_zone=run.instance.spec.availability_zone, facts={"ports": (), "volumes": ()})


async def _build_on(run: Run, cloud: Cloud, host: str) -> None:
    instance, hosts = run.instance, run.hosts
    await run.step("claim", cloud.scheduler.claim, f"{run.operation.id}:{host}", instance.id, host,
                   claimed_flavor(instance), undo=cloud.scheduler.release)  # fmt: skip
    ports = await run.step("allocate ports", allocate_ports, run, cloud, host,
                           undo=release_ports, task=TaskState.NETWORKING, on="network")  # fmt: skip
    run.note(host=host, availability_zone=cloud.scheduler.zone_of(host), facts={"ports": ports})
    volumes = await volumes_of_build(run, cloud, host)
    if volumes:
        run.note(facts={"volumes": volumes})
        instance = with_volumes(instance, volumes)
    source = None
    if not boots_from_volume(instance):
        source = await run.step(
            "find image", cloud.images.image_source, image_id(run), task=TaskState.BLOCK_DEVICE_MAPPING,
            deadline_s=cloud.settings.lifecycle.data_move_max_s,
        )  # fmt: skip
        await run.step("fetch image", hosts.ensure_image, host, source, task=TaskState.SPAWNING)
    disks = disks_of(instance, source)
    for disk in disks:
        await run.step(f"create {disk.name} disk", hosts.ensure_disk, host, disk,
                       undo=hosts.ensure_no_disks, task=TaskState.SPAWNING)  # fmt: skip
    state = await start_guest(
        run, host, guest_of(instance, disks, ports), undo=hosts.undo_of_running(disks), undo_ports=hosts.ensure_no_ports,
        task=TaskState.SPAWNING,
    )  # fmt: skip
    run.note(launched_at=now_us())
    await run.settle(VmState.ACTIVE, power_state=state)


def scheduling_request(run: Run) -> SchedulingRequest:
    spec = run.instance.spec
    return SchedulingRequest(
        instance_id=run.instance.id,
        project_id=run.instance.project_id,
        flavor=claimed_flavor(run.instance),
        image_properties=spec.image.properties if spec.image else {},
        availability_zone=spec.availability_zone,
        requested_host=spec.requested_host,
        hints=spec.hints,
        group_id=spec.group_id,
    )


def image_id(run: Run) -> str:
    assert run.instance.spec.image is not None, "the API accepts no server without an image"
    return run.instance.spec.image.id


async def allocate_ports(run: Run, cloud: Cloud, host: str) -> tuple[InstancePort, ...]:
    """Ports with addresses, bound to the host."""
    instance, spec = run.instance, run.instance.spec
    return await cloud.networks.allocate(
        instance.id,
        project_id=instance.project_id,
        hostname=instance.hostname,
        requested=spec.networks,
        security_groups=spec.security_groups,
        availability_zone=instance.availability_zone or "",
        host=host,
    )


async def release_ports(run: Run, cloud: Cloud, _host: str) -> None:
    await cloud.networks.release(run.instance.id)
