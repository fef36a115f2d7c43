"""Pause and unpause: pausing → paused, unpausing → active. The guest's processors stand still, its memory stays."""

from __future__ import annotations

from instar.engine.run import Run
from instar.errors import HypervisorError
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import disks_of, guest_of, host_of
from instar.model.states import PowerState, VmState


async def pause(run: Run, cloud: Cloud) -> None:
    host, guest = host_of(run.instance), guest_of(run.instance, disks_of(run.instance, None), run.facts.ports)
    state = await run.step("pause guest", run.hosts.ensure_paused, host, guest, undo=run.hosts.ensure_running)
    if state.power_state is not PowerState.PAUSED:
        raise HypervisorError(reason="the guest is not paused")
    await run.settle(VmState.PAUSED, power_state=state.power_state)


async def unpause(run: Run, cloud: Cloud) -> None:
    host, guest = host_of(run.instance), guest_of(run.instance, disks_of(run.instance, None), run.facts.ports)
    state = await run.step("resume guest", run.hosts.ensure_running, host, guest, undo=run.hosts.ensure_paused)
    if state.power_state is not PowerState.RUNNING:
        raise HypervisorError(reason="the guest is not running")
    await run.settle(VmState.ACTIVE, power_state=state.power_state)
