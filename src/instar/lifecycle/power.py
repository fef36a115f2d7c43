"""Start and stop: powering-on → active, powering-off → stopped.

Stop asks the guest by ACPI, waits the grace time, then ends it. Either failure leaves the instance as it was.
"""

from __future__ import annotations

from instar.engine.run import Run
from instar.errors import HypervisorError
from instar.lifecycle import volumes
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import disks_of, guest_of, host_of
from instar.lifecycle.start_guest import start_guest
from instar.model.states import PowerState, VmState


async def start(run: Run, cloud: Cloud) -> None:
    instance, host = run.instance, host_of(run.instance)
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id)
    connected = await volumes.connected_anew(run, cloud, host)
    guest = guest_of(connected, disks_of(connected, None), ports)
    state = await start_guest(run, host, guest, undo=run.hosts.ensure_not_running)
    run.note(facts={"volumes": connected.facts.volumes})
    await run.settle(VmState.ACTIVE, power_state=state)


async def stop(run: Run, cloud: Cloud) -> None:
    host, grace_s = host_of(run.instance), cloud.settings.lifecycle.shutdown_grace_s
    state = await run.step("stop guest", run.hosts.ensure_stopped, host, grace_s, deadline_s=grace_s + 60)
    if state.power_state is PowerState.RUNNING:
        raise HypervisorError(reason="the guest still runs")
    await run.settle(VmState.STOPPED, power_state=PowerState.SHUTDOWN)
