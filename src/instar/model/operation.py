"""An operation and its journal: the one record that users read as instance actions and that recovery works from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from instar.model.states import VmState


class Operation(msgspec.Struct, frozen=True):
    """One operation on one instance. `rule` is its key in TRANSITIONS, `turn` its place among the instance's operations.

    `owner` and `epoch` say which conductor runs it; `cancelled_by` names the operation that takes over."""

    id: str
    instance_id: str
    action: str
    rule: str
    request_id: str
    user_id: str
    project_id: str
    turn: int
    vm_state_before: VmState
    arguments: bytes
    owner: str | None
    epoch: int
    cancelled_by: str | None
    started_at: int
    updated_at: int
    finished_at: int | None
    result: str | None  # Success | Error
    message: str | None


class Step(msgspec.Struct, frozen=True):
    """One journaled step. `result` None while it runs. `output` is the msgpack of what the call returned."""

    operation_id: str
    seq: int
    name: str
    participant: str
    host: str | None
    started_at: int
    finished_at: int | None
    result: str | None  # Success | Error
    output: bytes | None
    error: bytes | None  # msgpack of RecordedError
    traceback: str | None
    hypervisor_us: int | None
    task_state: str | None


class RecordedError(msgspec.Struct, frozen=True):
    """An error as the journal keeps it, to be made again on replay."""

    code: str
    message: str
    facts: dict[str, Any]


class OperationAccepted(msgspec.Struct, frozen=True, tag=True):
    """Told to the conductors' queue when an operation was recorded: somebody take it."""

    operation_id: str
    instance_id: str


class Notification(msgspec.Struct, frozen=True):
    """A versioned notification: `event_type` is instance.<action>.<phase>; times are microseconds since the epoch."""

    message_id: str
    event_type: str
    timestamp: int
    payload: dict[str, Any]
    publisher_id: str
    priority: str = "INFO"


def operation_from_row(row: Mapping[str, Any]) -> Operation:
    values = {name: row[name] for name in Operation.__struct_fields__}
    values["vm_state_before"] = VmState(values["vm_state_before"])
    return Operation(**values)


def step_from_row(row: Mapping[str, Any]) -> Step:
    return Step(**{name: row[name] for name in Step.__struct_fields__})
