"""Delete: whatever was in flight is unwound first (the engine sees to that), then guest, ports and claims are given back.

A host that cannot be reached does not hold up a delete: its leftovers are removed when it returns (reconcile.py).
"""

from __future__ import annotations

import structlog

from instar.clock import now_us
from instar.engine.hosts import tell_leftovers
from instar.engine.run import Run
from instar.errors import HostUnreachable, HypervisorUnavailable, StepTimeout
from instar.lifecycle.cloud import Cloud
from instar.model.states import PowerState, VmState
from instar.store.instances import usage_give_back

log = structlog.get_logger()


async def delete(run: Run, cloud: Cloud) -> None:
    # Read as a step: the operation that was taken over may have found or given back a host since this one was accepted.
    instance = await run.step("read instance", run.current_instance, on="database")
    if instance.host:
        try:
            await run.step("remove guest", run.hosts.ensure_absent, instance.host)
        except (HostUnreachable, HypervisorUnavailable, StepTimeout) as error:
            log.warning("delete.host_away", instance=instance.id, host=instance.host, reason=error.message)
            await tell_leftovers(cloud.bus, instance.host)
    await run.step("release ports", cloud.networks.release, instance.id)
    await run.step("release claims", cloud.scheduler.release_instance, instance.id)
    run.note(deleted=1, terminated_at=now_us())
    await run.settle(VmState.DELETED, power_state=PowerState.NOSTATE, also=(usage_give_back(instance.id),))
