"""Power sync: what the hypervisor reports by itself wins, for stable states, and never while an operation is in flight.

It takes no input: it reads what the record says and what the host says, and repairs the record. An event of the host
only makes it run sooner.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import structlog

from instar.clock import now_us
from instar.lifecycle.cloud import Cloud
from instar.model.guest import GuestState
from instar.model.instance import Instance
from instar.model.operation import Operation
from instar.model.states import PowerState, VmState
from instar.store.console_tokens import console_tokens_revoke
from instar.store.contract import WriteConflict
from instar.store.instances import instance_power_sync
from instar.store.operations import operation_insert

log = structlog.get_logger()

_S, _P = VmState, PowerState
_OFF = (_P.NOSTATE, _P.SHUTDOWN, _P.CRASHED)

# What a stable state becomes when the hypervisor says so. What is not here stays, with the new power_state.
SYNCED: Mapping[tuple[VmState, PowerState], VmState] = {
    **{(_S.ACTIVE, off): _S.STOPPED for off in _OFF},
    **{(_S.PAUSED, off): _S.STOPPED for off in _OFF},
    (_S.ACTIVE, _P.PAUSED): _S.PAUSED,
    (_S.PAUSED, _P.RUNNING): _S.ACTIVE,
    (_S.STOPPED, _P.RUNNING): _S.ACTIVE,
    (_S.STOPPED, _P.PAUSED): _S.PAUSED,
    (_S.SUSPENDED, _P.RUNNING): _S.ACTIVE,
}
ACTION = "power-sync"


async def sync(cloud: Cloud, instance: Instance, state: GuestState) -> bool:
    """Make the record say what is. Returns whether it was changed; a change of vm_state leaves an action record."""
    if instance.maybe_on is not None:
        return False  # what one of two hosts says is not the whole truth: find_guest.py
    power = state.power_state if state.exists else PowerState.NOSTATE
    if instance.vm_state is VmState.STOPPED and power is PowerState.NOSTATE:
        power = PowerState.SHUTDOWN
    vm_state = SYNCED.get((instance.vm_state, power), instance.vm_state)
    if instance.task_state is not None or (vm_state, power) == (instance.vm_state, instance.power_state):
        return False
    writes = [console_tokens_revoke(instance.id)] if power in _OFF else []  # in the order of operations.py
    writes.append(instance_power_sync(instance, vm_state=vm_state, power_state=int(power)))
    if vm_state is not instance.vm_state:
        writes.append(operation_insert(_record(instance, vm_state)))
    try:
        await cloud.store.write(*writes)
    except WriteConflict:
        return False  # an operation began meanwhile: it knows better
    log.info("power.synced", instance=instance.id, was=instance.vm_state.value, now=vm_state.value, power=power.name)
    return True


def _record(instance: Instance, vm_state: VmState) -> Operation:
    now = now_us()
    return Operation(
        id=str(uuid.uuid4()), instance_id=instance.id, action=ACTION, rule=ACTION, request_id=f"req-{uuid.uuid4()}",
        user_id="", project_id=instance.project_id, turn=0, vm_state_before=instance.vm_state, arguments=b"\xc0",
        owner=None, epoch=0, cancelled_by=None, started_at=now, updated_at=now, finished_at=now, result="Success",
        message=f"The guest changed by itself: {instance.vm_state.value} is now {vm_state.value}",
    )  # fmt: skip
