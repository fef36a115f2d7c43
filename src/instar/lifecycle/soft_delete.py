"""Soft delete and restore: soft-deleting → soft-delete, restoring → as it was.

Where a reclaim interval is set, a deleted instance is only switched off, and can be restored until the interval is over.
"""

from __future__ import annotations

import structlog

from instar.clock import now_us
from instar.engine.hosts import tell_leftovers
from instar.engine.run import Run
from instar.errors import HOST_AWAY
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import disks_of, guest_of
from instar.lifecycle.delete import delete
from instar.lifecycle.start_guest import start_guest
from instar.model.states import PowerState, VmState

log = structlog.get_logger()

WAS, SINCE = "soft_deleted_from", "soft_deleted_at"
OFF = frozenset({VmState.STOPPED, VmState.SHELVED, VmState.SHELVED_OFFLOADED})


async def soft_delete(run: Run, cloud: Cloud) -> None:
    """What never got to a host, or failed, has nothing to come back to: it is deleted at once."""
    instance = await run.step("read instance", run.current_instance, on="database")
    if instance.host is None or instance.vm_state in (VmState.BUILDING, VmState.ERROR, VmState.RESIZED):
        await delete(run, cloud)
        return
    grace_s = cloud.settings.lifecycle.shutdown_grace_s
    try:
        await run.step("stop guest", run.hosts.ensure_stopped, instance.host, grace_s, deadline_s=grace_s + 60)
    except HOST_AWAY as error:
        # The guest is ended when the host answers again (reconcile.py).
        log.warning("soft_delete.host_away", instance=instance.id, host=instance.host, reason=error.message)
        await tell_leftovers(cloud.bus, instance.host)
    marks = {WAS: instance.vm_state.value, SINCE: str(now_us())}
    run.note(facts={"system_metadata": {**instance.facts.system_metadata, **marks}})
    await run.settle(VmState.SOFT_DELETED, power_state=PowerState.SHUTDOWN)


async def restore(run: Run, cloud: Cloud) -> None:
    """Powered on as before: one that was stopped stays stopped."""
    instance = run.instance
    metadata = dict(instance.facts.system_metadata)
    was = VmState(metadata.pop(WAS, VmState.ACTIVE.value))
    metadata.pop(SINCE, None)
    power_state = PowerState.SHUTDOWN
    if was not in OFF and instance.host is not None:
        ports = await run.step("read ports", cloud.networks.ports_of, instance.id)
        guest = guest_of(instance, disks_of(instance, None), ports)
        power_state = await start_guest(run, instance.host, guest, undo=run.hosts.ensure_not_running)
        was = VmState.ACTIVE
    run.note(facts={"system_metadata": metadata})
    await run.settle(was, power_state=power_state)
