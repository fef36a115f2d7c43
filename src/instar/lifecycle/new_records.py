"""Rows as the door writes them: a new instance, and an operation on one."""

from __future__ import annotations

import uuid

import msgspec

from instar.clock import now_us
from instar.model.context import RequestContext
from instar.model.instance import Instance, InstanceFacts, InstanceSpec
from instar.model.operation import Operation
from instar.model.states import TRANSITIONS, Action, PowerState, VmState


class NewInstance(msgspec.Struct, frozen=True):
    """A server to be built, as checked by the API."""

    name: str
    hostname: str
    spec: InstanceSpec
    id: str | None = None


def new_instance(context: RequestContext, draft: NewInstance, now: int, reservation: str) -> Instance:
    """As it is before its build has begun. `now` in microseconds, `reservation` is that of all that were asked for."""
    return Instance(
        id=draft.id or str(uuid.uuid4()),
        project_id=context.project_id,
        user_id=context.user_id,
        name=draft.name,
        hostname=draft.hostname,
        vm_state=VmState.BUILDING,
        task_state=TRANSITIONS[Action.CREATE].task,
        power_state=PowerState.NOSTATE,
        host=None,
        availability_zone=draft.spec.availability_zone,
        created_at=now,
        updated_at=now,
        launched_at=None,
        terminated_at=None,
        locked_by=None,
        reservation_id=reservation,
        turn=1,
        epoch=0,
        revision=0,
        spec=draft.spec,
        facts=InstanceFacts(),
    )


def new_operation(
    context: RequestContext, instance: Instance, action: Action, rule: str, arguments: msgspec.Struct | None = None
) -> Operation:
    """`rule` is a key of TRANSITIONS. Its turn is given by the database."""
    now = now_us()
    return Operation(
        id=str(uuid.uuid4()),
        instance_id=instance.id,
        action=action.value,
        rule=str(rule),
        request_id=context.request_id,
        user_id=context.user_id,
        project_id=context.project_id,
        turn=0,  # given by the database
        vm_state_before=instance.vm_state,
        arguments=msgspec.msgpack.encode(arguments),
        owner=None,
        epoch=0,
        cancelled_by=None,
        started_at=now,
        updated_at=now,
        finished_at=None,
        result=None,
        message=None,
    )


def finished(operation: Operation) -> Operation:
    """An action that was done in the transaction which records it."""
    return msgspec.structs.replace(operation, finished_at=operation.started_at, result="Success")
