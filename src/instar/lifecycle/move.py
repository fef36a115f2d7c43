"""Resize and cold migration, confirm and revert (LIFECYCLE section 4).

The guest is shut down, its disks are set aside on the source and fetched by the destination, and the guest is started there
with the size it will have. Until that is confirmed the source keeps everything as it was: a revert goes back to it, and to
the data that was there. A failure at any step puts the guest back where it ran.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import structlog

from instar.clock import MICROS_PER_S, now_us
from instar.engine.hosts import tell_leftovers
from instar.engine.run import Run
from instar.errors import HOST_AWAY, Conflict, NoValidHost, StreamBroken
from instar.lifecycle import volumes
from instar.lifecycle.build import scheduling_request
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import claimed_flavor, disks_of, guest_of, host_of
from instar.lifecycle.ids import new_id
from instar.lifecycle.ports import bind_ports_back, bind_ports_to
from instar.lifecycle.start_guest import start_guest
from instar.model.instance import Flavor, Instance, InstanceSpec, InstanceVolume, PendingMove
from instar.model.move import MoveStatus, MoveType
from instar.model.network import InstancePort
from instar.model.states import Action, PowerState, TaskState, VmState
from instar.scheduling.scheduler import HostFull
from instar.store.moves import migration_insert, migration_status

log = structlog.get_logger()

FETCHES_MAX = 2


class MoveArguments(msgspec.Struct, frozen=True):
    """`flavor` None: the same size on another host. `host`: an admin's choice. `old`: the size that it had when the resize
    was accepted, which the record no longer tells once the resize has come far."""

    flavor: Flavor | None = None
    host: str | None = None
    old: Flavor | None = None


def took_quota(cloud: Cloud, run: Run) -> None:
    """A resize: what the new flavor has more was counted when it was accepted."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=MoveArguments)
    run.took("count new flavor", _back_to(run, arguments.old or run.instance.spec.flavor), on="database")


async def move(run: Run, cloud: Cloud) -> None:
    """Resize and migrate. Raises NoValidHost; the instance runs as before then."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=MoveArguments)
    instance, source = run.instance, host_of(run.instance)
    old, new = arguments.old or instance.spec.flavor, arguments.flavor or instance.spec.flavor
    migration = await run.step("choose migration id", new_id)
    if instance.facts.move is not None:  # an admin reset the state while it was resized
        await _forget_earlier(run, cloud, instance.facts.move)
    dest, claim_id = await _claim_destination(run, cloud, new, arguments)
    kind = MoveType.RESIZE if run.operation.action == Action.RESIZE else MoveType.MIGRATION
    run.also(
        *migration_insert(
            migration, run.operation, kind, source=source, dest=dest, old_flavor_id=old.id, new_flavor_id=new.id,
            status=MoveStatus.PRE_MIGRATING,
        )
    )  # fmt: skip
    run.when_failed(migration_status(migration, MoveStatus.ERROR))
    await _leave_source(run, cloud, source)
    ports, connected = await _arrive(run, cloud, source, dest)
    run.also(migration_status(migration, MoveStatus.POST_MIGRATING))
    state = await _finish_on(run, cloud, dest, new, ports, connected)
    await run.step("take new flavor", run.change_spec, lambda spec: _with_flavor(spec, new), old,
                   undo=_back_to(run, old), task=TaskState.RESIZE_FINISH, on="database")  # fmt: skip
    window_s = cloud.settings.lifecycle.resize_confirm_window_s
    pending = PendingMove(
        migration=migration, source=source, dest=dest, old_flavor=old, new_flavor=new, claim_id=claim_id,
        was=instance.vm_state, ends_at=now_us() + round(window_s * MICROS_PER_S) if window_s else None,
    )  # fmt: skip
    run.note(host=dest, availability_zone=cloud.scheduler.zone_of(dest),
             facts={"move": pending, "ports": ports, "volumes": connected})  # fmt: skip
    run.also(migration_status(migration, MoveStatus.FINISHED))
    await run.settle(VmState.RESIZED, power_state=state)


async def _forget_earlier(run: Run, cloud: Cloud, earlier: PendingMove) -> None:
    await run.step("remove what was kept", run.hosts.ensure_nothing_aside, earlier.source)
    await run.step("release old claim", cloud.scheduler.release_others, run.instance.id, earlier.claim_id)


async def _claim_destination(run: Run, cloud: Cloud, flavor: Flavor, arguments: MoveArguments) -> tuple[str, str]:
    """The host, and the claim on it. It stands beside the old one until the move is confirmed or reverted."""
    instance, source = run.instance, host_of(run.instance)
    stays = run.operation.action == Action.RESIZE and cloud.settings.lifecycle.allow_resize_to_same_host
    request = msgspec.structs.replace(
        scheduling_request(run), flavor=claimed_flavor(instance, flavor), exclude_hosts=() if stays else (source,),
        requested_host=arguments.host,
    )  # fmt: skip
    selection = await run.step("select hosts", cloud.scheduler.candidates, request)
    full = []
    for host in selection.hosts:
        claim_id = f"{run.operation.id}:{host}"
        try:
            async with run.scope():
                await run.step("claim", cloud.scheduler.claim, claim_id, instance.id, host,
                               claimed_flavor(instance, flavor), undo=cloud.scheduler.release)  # fmt: skip
        except HostFull as error:
            full.append(f"{host}: {error.message}")
        else:
            return host, claim_id
    raise NoValidHost(reason=f"Tried {len(full)}: they filled up meanwhile.", details=[*full, *selection.details])


async def _leave_source(run: Run, cloud: Cloud, source: str) -> None:
    instance, grace_s = run.instance, cloud.settings.lifecycle.shutdown_grace_s
    if instance.vm_state is VmState.ACTIVE:
        guest = guest_of(instance, disks_of(instance, None), run.facts.ports)
        await run.step("stop guest", run.hosts.ensure_stopped, source, grace_s, guest,
                       undo=run.hosts.start_again, task=TaskState.RESIZE_MIGRATING, deadline_s=grace_s + 60)  # fmt: skip
    await run.step("set disks aside", run.hosts.ensure_set_aside, source,
                   undo=run.hosts.ensure_brought_back, task=TaskState.RESIZE_MIGRATING)  # fmt: skip


async def _arrive(
    run: Run, cloud: Cloud, source: str, dest: str
) -> tuple[tuple[InstancePort, ...], tuple[InstanceVolume, ...]]:
    """Disks, ports and volumes are on the destination."""
    limit_s = cloud.settings.lifecycle.data_move_max_s
    await run.step("fetch disks", fetch_disks, dest, source, run, limit_s,
                   undo=drop_disks, on="compute", deadline_s=limit_s + 60)  # fmt: skip
    ports = await run.step("bind ports", bind_ports_to, cloud, run.instance, dest, source,
                           undo=bind_ports_back, task=TaskState.RESIZE_MIGRATED, on="network")  # fmt: skip
    return ports, await volumes.connect_from(run, cloud, source, dest)


async def fetch_disks(dest: str, source: str, run: Run, limit_s: float) -> None:
    """The destination fetches the disks; what was fetched before a crash is not fetched again. A source whose agent was
    started again has forgotten what it offered: it is asked once more."""
    for fetches_left in reversed(range(FETCHES_MAX)):
        to = await run.hosts.stream_address(dest)
        offer = await run.hosts.offer_disks(source, to)
        try:
            await run.hosts.receive_disks(dest, offer, limit_s)
        except StreamBroken:
            if not fetches_left:
                raise
        else:
            break


async def drop_disks(dest: str, _source: str, run: Run, *_: object) -> None:
    """Undo: the destination has nothing of the instance. What is set aside stays (the same host may be the source)."""
    await run.hosts.ensure_absent(dest)


async def _finish_on(
    run: Run,
    cloud: Cloud,
    dest: str,
    flavor: Flavor,
    ports: tuple[InstancePort, ...],
    connected: tuple[InstanceVolume, ...],
) -> PowerState:
    """The disks have the flavor's size, and the guest runs unless it was stopped."""
    hosts, moved = run.hosts, _resized(run.instance, flavor, connected)
    disks = disks_of(moved, None)
    for disk in disks:
        await run.step(f"grow {disk.name} disk", hosts.ensure_disk_size, dest, disk, task=TaskState.RESIZE_FINISH)
    if run.instance.vm_state is not VmState.ACTIVE:
        return PowerState.SHUTDOWN
    guest = guest_of(moved, disks, ports)
    return await start_guest(run, dest, guest, undo=hosts.ensure_no_guest, undo_ports=hosts.ensure_no_ports)


def _resized(instance: Instance, flavor: Flavor, connected: tuple[InstanceVolume, ...]) -> Instance:
    return msgspec.structs.replace(
        volumes.with_volumes(instance, connected), spec=_with_flavor(instance.spec, flavor)
    )


def _with_flavor(spec: InstanceSpec, flavor: Flavor) -> InstanceSpec:
    return msgspec.structs.replace(spec, flavor=flavor)


def _back_to(run: Run, flavor: Flavor) -> Callable[..., Awaitable[None]]:
    async def undo(*_: object) -> None:
        await run.change_spec(lambda spec: _with_flavor(spec, flavor))

    return undo


# --- the two ends ---------------------------------------------------------------------------------------------------------


async def confirm(run: Run, cloud: Cloud) -> None:
    """What the source kept is gone. A source that is away does not hold it up: it is cleaned when it comes back."""
    pending = pending_move(run.instance)
    if pending.reverting:
        raise Conflict(f"Instance {run.instance.id} is half reverted already, it can only be reverted.")
    try:
        await run.step("remove what was kept", forget_source, pending.source, pending.dest, run, on="compute")
    except HOST_AWAY as error:
        log.warning("confirm.host_away", instance=run.instance.id, host=pending.source, reason=error.message)
        await tell_leftovers(cloud.bus, pending.source)
    run.keep()
    await run.step("release old claim", cloud.scheduler.release_others, run.instance.id, pending.claim_id)
    await run.step("count new flavor", run.change_spec, lambda spec: spec, on="database")
    stopped = pending.was is VmState.STOPPED and run.instance.power_state is not PowerState.RUNNING
    run.note(facts={"move": None})
    run.also(migration_status(pending.migration, MoveStatus.CONFIRMED))
    await run.settle(VmState.STOPPED if stopped else VmState.ACTIVE)


async def forget_source(source: str, dest: str, run: Run) -> None:
    await run.hosts.ensure_nothing_aside(source)
    if source != dest:
        await run.hosts.ensure_absent(source)


async def revert(run: Run, cloud: Cloud) -> None:
    """Back to the source, the old size and the old data. One that fails stays to be reverted: it may be tried again."""
    pending, instance, hosts = pending_move(run.instance), run.instance, run.hosts
    source, dest = pending.source, pending.dest
    run.note(facts={"move": msgspec.structs.replace(pending, reverting=True)})
    try:
        await run.step("remove guest", hosts.ensure_absent, dest)
    except HOST_AWAY as error:
        if source == dest:
            raise
        log.warning("revert.host_away", instance=instance.id, host=dest, reason=error.message)
        await tell_leftovers(cloud.bus, dest)
    await run.step("bring disks back", hosts.ensure_brought_back, source)
    ports = await run.step("bind ports", bind_ports_to, cloud, instance, source, dest, on="network")
    connected = await volumes.connect_from(run, cloud, dest, source)
    await run.step("take old flavor", run.change_spec, lambda spec: _with_flavor(spec, pending.old_flavor), on="database")
    await run.step("release new claim", cloud.scheduler.release, pending.claim_id)
    before = _resized(instance, pending.old_flavor, connected)
    run.note(host=source, availability_zone=cloud.scheduler.zone_of(source),
             facts={"ports": ports, "volumes": connected})  # fmt: skip
    power_state = PowerState.SHUTDOWN
    if pending.was is not VmState.STOPPED:
        power_state = await start_guest(run, source, guest_of(before, disks_of(before, None), ports), undo=None)
    run.note(facts={"move": None})
    run.also(migration_status(pending.migration, MoveStatus.REVERTED))
    await run.settle(VmState.STOPPED if pending.was is VmState.STOPPED else VmState.ACTIVE, power_state=power_state)


def pending_move(instance: Instance) -> PendingMove:
    """Raises Conflict where nothing waits to be confirmed."""
    if instance.facts.move is None:
        raise Conflict(f"Instance {instance.id} has no resize that could be confirmed or reverted.")
    return instance.facts.move


def root_is_smaller(old: Flavor, new: Flavor) -> bool:
    """A root disk is never made smaller. 0 is as large as the image is."""
    return new.root_gib != 0 and new.root_gib < old.root_gib
