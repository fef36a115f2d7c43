"""Evacuate: an instance whose host is down is built again on another one (LIFECYCLE section 4).

Local disks are made anew from the image; volumes, and disks on storage that both hosts share, are kept. When the dead host
returns its leftovers are removed, never the new guest: the record says where the instance is.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from instar.clock import now_us
from instar.engine.hosts import HostClient, tell_leftovers
from instar.engine.run import Run
from instar.errors import HostInUse, HostUnreachable, HypervisorUnavailable, StepTimeout, WhereaboutsUnknown
from instar.lifecycle import volumes
from instar.lifecycle.build import scheduling_request
from instar.lifecycle.candidates import WORTH_ANOTHER_HOST, Refusals
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import claimed_flavor, disks_of, guest_of, host_of, source_if_there
from instar.lifecycle.ids import new_id
from instar.lifecycle.ports import bind_ports_back, bind_ports_to
from instar.lifecycle.start_guest import start_guest
from instar.model.move import MoveStatus, MoveType
from instar.model.states import PowerState, TaskState, VmState
from instar.store.audit import NOT_ON_THE_OTHER
from instar.store.moves import migration_insert, migration_status

ASK_DEADLINE_S = 2.0
ASK_AGAIN_S = 0.2


class EvacuateArguments(msgspec.Struct, frozen=True):
    """`host`: an admin's choice, None for the scheduler's. `stopped`: the guest is not started there."""

    host: str | None = None
    stopped: bool = False


async def evacuate(run: Run, cloud: Cloud) -> None:
    """Raises NoValidHost; the instance stays where it is then, to be evacuated again."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=EvacuateArguments)
    instance, dead = run.instance, host_of(run.instance)
    await run.step("make sure the host is down", make_sure_it_is_down, dead, run, cloud)
    other = instance.maybe_on
    if other is not None:
        await run.step(NOT_ON_THE_OTHER, make_sure_it_is_not_on, other, run, cloud)
    migration = await run.step("choose migration id", new_id)
    flavor_id = instance.spec.flavor.id
    stopped = arguments.stopped or instance.vm_state is VmState.STOPPED
    run.also(
        *migration_insert(
            migration, run.operation, MoveType.EVACUATION, source=dead, dest=arguments.host, old_flavor_id=flavor_id,
            new_flavor_id=flavor_id, status=MoveStatus.PRE_MIGRATING,
        )
    )  # fmt: skip
    run.when_failed(migration_status(migration, MoveStatus.ERROR))
    request = msgspec.structs.replace(
        scheduling_request(run), exclude_hosts=(dead, other) if other else (dead,), requested_host=arguments.host
    )
    selection = await run.step("select hosts", cloud.scheduler.candidates, request)
    refusals = Refusals()
    for dest in selection.hosts:
        try:
            async with run.scope():
                await _build_on(run, cloud, dead, dest, migration, stopped)
            if other is not None:
                await tell_leftovers(cloud.bus, other)
            return
        except WORTH_ANOTHER_HOST as error:
            refusals.add(dest, error)
    raise refusals.no_valid_host(selection.details)


async def make_sure_it_is_down(host: str, run: Run, cloud: Cloud) -> None:
    """Its guests may be built elsewhere: it gives no answer, and has been silent for so long that its agent has shut it.
    Raises HostInUse. Who accepted this knew only what it had heard, and that may have been nothing yet."""
    client, started = HostClient(cloud.bus, deadline_s=ASK_DEADLINE_S), time.monotonic()
    while not cloud.scheduler.is_forced_down(host):
        try:
            await client.observe_of(host, run.instance.id)
        except HypervisorUnavailable:
            raise HostInUse(host=host) from None  # its agent answers, libvirt does not: guests run without that
        except (HostUnreachable, StepTimeout):
            if cloud.scheduler.fell_silent(host, time.monotonic() - started):
                return
        else:
            raise HostInUse(host=host)
        await asyncio.sleep(ASK_AGAIN_S)


async def make_sure_it_is_not_on(other: str, run: Run, cloud: Cloud) -> None:
    """The guest did not come to this host, and cannot any more; or the host is down as well. Raises WhereaboutsUnknown
    where it has the guest: that one is not to be replaced, and is found soon."""
    started = time.monotonic()
    while not cloud.scheduler.is_forced_down(other):
        try:
            state = await run.hosts.observe(other)
            if state.exists:
                raise WhereaboutsUnknown(id=run.instance.id)
            await run.hosts.ensure_absent(other)
            return
        except HypervisorUnavailable:
            raise WhereaboutsUnknown(id=run.instance.id) from None
        except (HostUnreachable, StepTimeout):
            if cloud.scheduler.fell_silent(other, time.monotonic() - started):
                return
        await asyncio.sleep(ASK_AGAIN_S)


async def _build_on(run: Run, cloud: Cloud, dead: str, dest: str, migration: str, stopped: bool) -> None:
    instance, hosts = run.instance, run.hosts
    claim_id = f"{run.operation.id}:{dest}"
    await run.step("claim", cloud.scheduler.claim, claim_id, instance.id, dest, claimed_flavor(instance),
                   undo=cloud.scheduler.release)  # fmt: skip
    ports = await run.step("bind ports", bind_ports_to, cloud, instance, dest, dead,
                           undo=bind_ports_back, on="network")  # fmt: skip
    connected = await volumes.connect_all(run, cloud, dest)
    moved = volumes.with_volumes(instance, connected)
    source = await run.step("find image", source_if_there, cloud.images, instance, on="image",
                            task=TaskState.REBUILD_BLOCK_DEVICE_MAPPING)  # fmt: skip
    if source is not None:
        await run.step("fetch image", hosts.ensure_image, dest, source)
    disks = disks_of(moved, source)
    for disk in disks:
        await run.step(f"create {disk.name} disk", hosts.ensure_disk, dest, disk, undo=hosts.ensure_no_disks)
    power_state = PowerState.SHUTDOWN
    if not stopped:
        power_state = await start_guest(
            run, dest, guest_of(moved, disks, ports), undo=hosts.undo_of_running(disks), undo_ports=hosts.ensure_no_ports,
            task=TaskState.REBUILD_SPAWNING,
        )  # fmt: skip
    await run.step("release old claim", cloud.scheduler.release_others, instance.id, claim_id)
    run.note(host=dest, availability_zone=cloud.scheduler.zone_of(dest), launched_at=now_us(), maybe_on=None,
             facts={"ports": ports, "volumes": connected})  # fmt: skip
    run.also(migration_status(migration, MoveStatus.DONE, dest=dest))
    await tell_leftovers(cloud.bus, dead)
    await run.settle(VmState.STOPPED if stopped else VmState.ACTIVE, power_state=power_state)
