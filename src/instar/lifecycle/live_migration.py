"""Live migration: the running guest goes to another host, with its memory and disks (LIFECYCLE section 4).

Until the guest runs on the destination everything can be undone, and it goes on at the source. From then on there is no
way back: what is left of it at the source is removed, at once or when that host answers again. When both hosts fall silent
in between, nothing is undone or begun before it is known where the guest is (`whereabouts.py`, `find_guest.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import structlog

from instar.engine.hosts import tell_leftovers
from instar.engine.run import Run
from instar.errors import (
    HOST_AWAY,
    Cancelled,
    HypervisorError,
    InstarError,
    LeaseLost,
    MigrationAborted,
    StepTimeout,
    TaskStateConflict,
    WhereaboutsUnknown,
)
from instar.lifecycle import volumes
from instar.lifecycle.build import scheduling_request
from instar.lifecycle.candidates import WORTH_ANOTHER_HOST, Refusals
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import claimed_flavor, disks_of, guest_of, host_of
from instar.lifecycle.ids import new_id
from instar.lifecycle.ports import bind_ports_to
from instar.lifecycle.whereabouts import Side, find_guest, side_of
from instar.model.guest import GuestDefinition, GuestState, LiveMigrationOptions, LiveTarget
from instar.model.instance import Instance, InstanceVolume
from instar.model.move import MoveStatus, MoveType
from instar.model.network import InstancePort
from instar.model.states import PowerState
from instar.store.moves import migration_goes_on, migration_insert, migration_status

log = structlog.get_logger()
T = TypeVar("T")

ATTEMPTS_MAX = 3
FIND_ATTEMPTS = 3


class LiveArguments(msgspec.Struct, frozen=True):
    """`host`: an admin's choice, None for the scheduler's. `block_migration`: None finds out; else it must be so."""

    host: str | None = None
    block_migration: bool | None = None


async def migrate_live(run: Run, cloud: Cloud) -> None:
    """Raises NoValidHost, MigrationAborted; the guest runs at the source then. Ends with WhereaboutsUnknown as its fault
    when the guest may be on either host, and neither tells."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=LiveArguments)
    # A step: the record names the new host from the moment when the guest is there.
    source = await run.step("note source", current_host, run)
    migration = await run.step("choose migration id", new_id)
    flavor_id = run.instance.spec.flavor.id
    run.also(
        *migration_insert(
            migration, run.operation, MoveType.LIVE, source=source, dest=arguments.host, old_flavor_id=flavor_id,
            new_flavor_id=flavor_id, status=MoveStatus.PREPARING,
        )
    )  # fmt: skip
    run.when_failed(migration_status(migration, MoveStatus.ERROR))
    request = msgspec.structs.replace(
        scheduling_request(run), exclude_hosts=(source,), requested_host=arguments.host
    )
    selection = await run.step("select hosts", cloud.scheduler.candidates, request)
    refusals = Refusals()
    for dest in selection.hosts:
        try:
            async with run.scope():
                connected = await _migrate_to(run, cloud, source, dest, migration, arguments)
        except MigrationAborted:
            run.note(maybe_on=None)  # it is at the source; or was told not to begin, together with the step that noted it
            run.also(migration_status(migration, MoveStatus.CANCELLED))
            run.when_failed(migration_status(migration, MoveStatus.CANCELLED))
            raise
        except WORTH_ANOTHER_HOST as error:
            refusals.add(dest, error)
            run.also(
                migration_goes_on(migration, MoveStatus.PREPARING, dest=None, aborted=MigrationAborted(id=run.instance.id))
            )
        else:
            if connected is None:
                return await _leave_to_be_found(run, cloud, source, dest, migration)
            run.also(migration_status(migration, MoveStatus.COMPLETED))
            paused = run.instance.power_state is PowerState.PAUSED
            power_state = PowerState.PAUSED if paused else PowerState.RUNNING
            return await stay_there(run, cloud, source, dest, connected, claim=_claim(run, dest), power_state=power_state)
    raise refusals.no_valid_host(selection.details)


async def _migrate_to(
    run: Run, cloud: Cloud, source: str, dest: str, migration: str, arguments: LiveArguments
) -> tuple[InstanceVolume, ...] | None:
    """The guest runs on the destination. Its volumes, as it has them there; None: it may run there, or at the source."""
    instance = run.instance
    await run.step("claim", cloud.scheduler.claim, _claim(run, dest), instance.id, dest, claimed_flavor(instance),
                   undo=cloud.scheduler.release)  # fmt: skip
    ports = await run.step("announce ports", announce_ports, cloud, instance, dest,
                           undo=withdraw_ports, on="network")  # fmt: skip
    connected = await volumes.connect_from(run, cloud, source, dest)
    guest = _guest_on_dest(run, ports, connected)
    target = await run.step("prepare destination", prepare, dest, source, run, guest,
                            undo=clear_destination, on="compute")  # fmt: skip
    if arguments.block_migration is not None and arguments.block_migration is target.shared_storage and guest.disks:
        shared = "share" if target.shared_storage else "do not share"
        raise HypervisorError(reason=f"the two hosts {shared} storage, which is not what was asked for")
    run.also(
        migration_goes_on(migration, MoveStatus.RUNNING, dest=dest, aborted=MigrationAborted(id=instance.id))
    )
    # On the record before it may be true: from here on nobody starts the guest at the source because it is not there.
    run.note(maybe_on=dest)
    return connected if await _until_it_is_there(run, cloud, source, dest, guest, target) else None


async def _leave_to_be_found(run: Run, cloud: Cloud, source: str, dest: str, migration: str) -> None:
    """Nothing is undone: the guest may need it where it is. The reconciler asks the hosts when they answer again."""
    run.also(migration_status(migration, MoveStatus.ERROR))
    run.keep()
    await run.step("leave it to be found", _tell_of, cloud, source, dest)
    await run.settle(fault=unknown_between(run.instance.id, source, dest))


async def _tell_of(cloud: Cloud, *hosts: str) -> None:
    for host in hosts:
        await tell_leftovers(cloud.bus, host)


def unknown_between(instance_id: str, source: str, dest: str) -> WhereaboutsUnknown:
    return WhereaboutsUnknown(
        id=instance_id,
        details=(
            f"It is on host {source}, or on host {dest} already. What of it is on the one may be older than on the other.",
            "If one of them is lost for good: force its compute service down, and reset the state of the server; then what "
            "the other one has is taken. If both are lost: evacuate the server.",
        ),
    )


async def stay_there(
    run: Run, cloud: Cloud, source: str, dest: str, connected: tuple[InstanceVolume, ...], *, claim: str,
    power_state: PowerState,
) -> None:  # fmt: skip
    """From here there is no way back: the destination is the host, and the source is cleaned."""
    instance, hosts = run.instance, run.hosts
    run.keep()
    run.note(host=dest, availability_zone=cloud.scheduler.zone_of(dest), maybe_on=None,
             facts={"volumes": connected, "leaving": source})  # fmt: skip
    bound = await insist(run, cloud, "bind ports", bind_ports_to, cloud, instance, dest, on="network")
    if bound:
        run.note(facts={"ports": bound})
        plugged = tuple(port.definition for port in bound)
        await insist(run, cloud, "set up ports", hosts.ensure_ports, dest, plugged, host=dest)
    await insist(run, cloud, "clean source", hosts.ensure_absent, source, host=source)
    await insist(run, cloud, "release old claim", cloud.scheduler.release_others, instance.id, claim)
    run.note(facts={"leaving": None})
    await run.settle(power_state=power_state)


def _claim(run: Run, dest: str) -> str:
    return f"{run.operation.id}:{dest}"


async def insist(
    run: Run,
    cloud: Cloud,
    name: str,
    call: Callable[..., Awaitable[T]],
    *args: object,
    host: str = "",
    on: str | None = None,
) -> T | None:
    """There is no way back any more: what fails is tried again, and in the end left to whoever looks at the host again."""
    for _ in range(ATTEMPTS_MAX):
        try:
            return await run.step(name, call, *args, on=on)
        except (Cancelled, LeaseLost, TaskStateConflict):
            raise
        except InstarError as error:
            log.warning("live_migration.not_done", instance=run.instance.id, step=name, reason=error.message)
            if isinstance(error, HOST_AWAY):
                break
    if host:
        await tell_leftovers(cloud.bus, host)
    return None


def _guest_on_dest(
    run: Run, ports: tuple[InstancePort, ...], connected: tuple[InstanceVolume, ...]
) -> GuestDefinition:
    moved = volumes.with_volumes(run.instance, connected)
    return guest_of(moved, disks_of(moved, None), ports)


async def current_host(run: Run) -> str:
    return host_of(run.instance)


async def announce_ports(cloud: Cloud, instance: Instance, dest: str) -> tuple[InstancePort, ...]:
    """The destination is part of the ports' networks before the guest is there."""
    return await cloud.networks.bind_ahead(instance.id, host=dest)


async def withdraw_ports(cloud: Cloud, instance: Instance, _dest: str) -> None:
    await cloud.networks.unbind_ahead(instance.id)


async def prepare(dest: str, source: str, run: Run, guest: GuestDefinition) -> LiveTarget:
    """The destination has what the guest needs, and the source may reach it."""
    if guest.ports:
        await run.hosts.ensure_ports(dest, guest.ports)
    offer = await run.hosts.offer_live(source, await run.hosts.stream_address(dest))
    return await run.hosts.ensure_ready_for_live(dest, guest, offer)


async def clear_destination(dest: str, source: str, run: Run, _guest: GuestDefinition) -> None:
    """Undo: nothing is left on the destination, as long as the guest is at its source. A source that is away need not be
    asked about a guest that never came here."""
    there = await run.hosts.observe(dest)
    if there.exists:
        await run.hosts.abort_live(source)  # whoever took over is not kept waiting: the source answers when it has ended
        was_paused = run.instance.power_state is PowerState.PAUSED
        if side_of(await run.hosts.observe(source), there, was_paused=was_paused) is not Side.SOURCE:
            raise HypervisorError(reason="the guest is no longer where it was, what is on the other host stays")
    await run.hosts.ensure_absent(dest)


async def _until_it_is_there(
    run: Run, cloud: Cloud, source: str, dest: str, guest: GuestDefinition, target: LiveTarget
) -> bool:
    """Whatever the source says of it, what counts is where the guest runs. False: that cannot be told."""
    settings = cloud.settings.lifecycle
    options = LiveMigrationOptions(settings.live_migration_bandwidth_mib_s, settings.live_migration_downtime_ms)
    limit_s = settings.data_move_max_s
    try:
        await run.step("migrate guest", run.hosts.migrate_live, source, guest, target, options, limit_s,
                       deadline_s=limit_s + 60)  # fmt: skip
    except (Cancelled, LeaseLost, TaskStateConflict):
        raise
    except InstarError:
        where = await ask_where(run, cloud, source, dest)
        if where == source:
            run.note(maybe_on=None)
            await insist(run, cloud, "let guest go on", let_go_on, run, source)
            raise
        return where == dest
    return True


async def let_go_on(run: Run, host: str) -> GuestState:
    """A migration that broke off in its last moments may have left the guest standing still: it goes on here."""
    state = await run.hosts.observe(host)
    if state.power_state is not PowerState.PAUSED or run.instance.power_state is PowerState.PAUSED:
        return state
    instance = run.instance
    return await run.hosts.ensure_running(host, guest_of(instance, disks_of(instance, None), instance.facts.ports))


async def ask_where(run: Run, cloud: Cloud, source: str, dest: str, given_up: tuple[str, ...] = ()) -> str:
    """As `find_guest`: a step with a deadline of its own."""
    # Time enough for the destination to be asked when the source does not answer.
    deadline_s = FIND_ATTEMPTS * cloud.settings.engine.step_deadline_s
    patience_s = cloud.settings.host.lost_after_s
    try:
        return await run.step("find guest", find_guest, source, dest, run, patience_s, given_up, deadline_s=deadline_s)
    except StepTimeout:
        return ""
