"""Suspend and resume: suspending → suspended, resuming → active.

The guest's memory is saved on its host's disk, and the guest goes on from there: nothing in it is started again.
"""

from __future__ import annotations

from instar.engine.run import Run
from instar.lifecycle import volumes
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import disks_of, guest_of, host_of
from instar.lifecycle.start_guest import start_guest
from instar.model.states import VmState


async def suspend(run: Run, cloud: Cloud) -> None:
    instance, host = run.instance, host_of(run.instance)
    guest = guest_of(instance, disks_of(instance, None), run.facts.ports)
    limit_s = cloud.settings.lifecycle.data_move_max_s
    state = await run.step(
        "save memory", run.hosts.ensure_suspended, host, guest, undo=run.hosts.ensure_running, deadline_s=limit_s
    )
    await run.settle(VmState.SUSPENDED, power_state=state.power_state)


async def resume(run: Run, cloud: Cloud) -> None:
    instance, host = run.instance, host_of(run.instance)
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id)
    connected = await volumes.connected_anew(run, cloud, host)
    guest = guest_of(connected, disks_of(connected, None), ports)
    state = await start_guest(run, host, guest, undo=run.hosts.ensure_suspended, step="resume guest")
    run.note(facts={"volumes": connected.facts.volumes})
    await run.settle(VmState.ACTIVE, power_state=state)
