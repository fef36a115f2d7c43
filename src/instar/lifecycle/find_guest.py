"""Find a guest whose live migration broke off while neither of its hosts answered, and make the record say where it is.

Begun by the reconciler when the hosts have said enough, and by an admin's word (decision 0019). Whoever has the guest keeps
it, with ports, volumes and claim; what is left of it on the other host is removed, at once or when that one answers again.
"""

from __future__ import annotations

import msgspec

from instar.engine.hosts import tell_leftovers
from instar.engine.run import Run
from instar.errors import HOST_AWAY
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import claimed_flavor, host_of
from instar.lifecycle.live_migration import ask_where, insist, let_go_on, stay_there, unknown_between
from instar.lifecycle.volumes import connect
from instar.model.guest import GuestState
from instar.model.instance import InstanceVolume
from instar.model.move import MoveStatus
from instar.store.moves import migration_found


class FindArguments(msgspec.Struct, frozen=True):
    """`given_up`: of its two hosts, those that are lost for good by an admin's word. What the other one has is taken."""

    given_up: tuple[str, ...] = ()


async def find(run: Run, cloud: Cloud) -> None:
    """Ends with WhereaboutsUnknown as its fault where the hosts do not tell after all."""
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=FindArguments)
    # A step: from some moment on the record says something else.
    source, dest = await run.step("note hosts", _noted_hosts, run)
    if not dest:
        await run.settle()
        return
    where = await ask_where(run, cloud, source, dest, arguments.given_up)
    if not where:
        await run.settle(fault=unknown_between(run.instance.id, source, dest))
        return
    state = await _look(run, where)
    claim_id, flavor = f"{run.operation.id}:{where}", claimed_flavor(run.instance)
    claim = await run.step("keep claim", cloud.scheduler.claim_anyway, claim_id, run.instance.id, where, flavor)
    connected = await _connected(run, cloud, where)
    if where == source:
        await _stay_here(run, cloud, source, dest, connected, claim)
    else:
        run.also(migration_found(run.instance.id, dest, MoveStatus.COMPLETED))
        power_state = run.instance.power_state if state is None else state.power_state
        await stay_there(run, cloud, source, dest, connected, claim=claim, power_state=power_state)
    if state is None or state.power_state is not run.instance.power_state:
        await tell_leftovers(cloud.bus, where)  # the power sync makes of it what is to be made of it


async def _noted_hosts(run: Run) -> tuple[str, str]:
    """By the record, and where it may be besides; empty: it is known by now."""
    return host_of(run.instance), run.instance.maybe_on or ""


async def _look(run: Run, host: str) -> GuestState | None:
    try:
        return await run.step("look at guest", run.hosts.observe, host)
    except HOST_AWAY:  # it was lost again
        return None


async def _connected(run: Run, cloud: Cloud, host: str) -> tuple[InstanceVolume, ...]:
    connected = []
    for volume in run.instance.facts.volumes:
        connection = await insist(run, cloud, f"connect volume {volume.device}", connect, cloud, volume, host, on="volume")
        connected.append(msgspec.structs.replace(volume, connection=connection or volume.connection))
    return tuple(connected)


async def _stay_here(
    run: Run, cloud: Cloud, source: str, dest: str, connected: tuple[InstanceVolume, ...], claim: str
) -> None:
    """It did not move: as after a live migration that was undone."""
    instance, hosts = run.instance, run.hosts
    run.keep()
    run.note(maybe_on=None, facts={"volumes": connected, "leaving": dest})
    await insist(run, cloud, "clean destination", hosts.ensure_absent, dest, host=dest)
    await insist(run, cloud, "withdraw ports", cloud.networks.unbind_ahead, instance.id)
    await insist(run, cloud, "release other claim", cloud.scheduler.release_others, instance.id, claim)
    run.note(facts={"leaving": None})
    state = await insist(run, cloud, "let guest go on", let_go_on, run, source, host=source)
    await run.settle(power_state=instance.power_state if state is None else state.power_state)
