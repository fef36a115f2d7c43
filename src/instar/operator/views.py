"""What the operators' API shows, as frozen records: times in microseconds since the epoch, durations with their unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from instar.lifecycle.audit import Finding
from instar.model.operation import Operation, Step
from instar.scheduling.host_view import HostView
from instar.store.drains import Drain, DrainMode, DrainMove, MoveState


class HostLine(msgspec.Struct, frozen=True):
    """One host. Amounts are what may be given out (ratios and reserves are in them) and what is claimed."""

    name: str
    state: str  # up | down
    enabled: bool
    disabled_reason: str | None
    zone: str
    virt_type: str
    instances: int
    operations: int
    vcpus: int
    vcpus_claimed: int
    memory_mib: int
    memory_claimed_mib: int
    disk_gib: int
    disk_claimed_gib: int
    agent_version: str = ""  # empty: nothing was heard of it yet, or it is one that does not say
    protocol: int = 1
    shut: bool = False  # it was cut off, and waits to be admitted


class StepLine(msgspec.Struct, frozen=True):
    """`host` is null for others than admins. `hypervisor_us`: how long the host itself worked."""

    name: str
    participant: str
    host: str | None
    started_at: int
    finished_at: int | None
    result: str | None
    hypervisor_us: int
    task_state: str | None


class OperationLine(msgspec.Struct, frozen=True):
    """`steps` is empty in lists of many instances."""

    id: str
    server_id: str
    action: str
    rule: str
    request_id: str
    project_id: str
    owner: str | None
    epoch: int
    started_at: int
    finished_at: int | None
    result: str | None
    message: str | None
    steps: list[StepLine]


class DrainWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request to empty a host. `concurrency` instances are moved at once."""

    mode: DrainMode = DrainMode.AUTO
    concurrency: Annotated[int, Meta(ge=1, le=100)] = 2


class DrainLine(msgspec.Struct, frozen=True):
    """One instance of a host that is drained. `status`: moving, again (after a failure), moved, left (for `reason`)."""

    server_id: str
    status: str
    how: str
    reason: str
    attempts: int


class DrainView(msgspec.Struct, frozen=True):
    """How far a drain is. `waiting` are on the host and were not begun yet; `servers` are those first that were left."""

    host: str
    mode: str
    concurrency: int
    status: str
    started_at: int
    updated_at: int
    moved: int
    moving: int
    waiting: int
    left: int
    servers: list[DrainLine]


class FindingLine(msgspec.Struct, frozen=True):
    kind: str
    subject: str
    host: str | None


def host_line(host: HostView, *, is_up: bool) -> HostLine:
    return HostLine(
        name=host.name,
        state="up" if is_up else "down",
        enabled=not host.disabled,
        disabled_reason=host.disabled_reason,
        zone=host.zone,
        virt_type=host.inventory.virt_type if host.inventory else "",
        instances=host.instances,
        operations=host.busy,
        vcpus=host.capacity.vcpus,
        vcpus_claimed=host.totals[0],
        memory_mib=host.capacity.memory_mib,
        memory_claimed_mib=host.totals[1],
        disk_gib=host.capacity.disk_gib,
        disk_claimed_gib=host.totals[2],
        agent_version=host.agent_version,
        protocol=host.protocol,
        shut=host.shut,
    )


def operation_line(operation: Operation, steps: list[Step], *, hosts_shown: bool) -> OperationLine:
    return OperationLine(
        id=operation.id,
        server_id=operation.instance_id,
        action=operation.action,
        rule=operation.rule,
        request_id=operation.request_id,
        project_id=operation.project_id,
        owner=operation.owner if hosts_shown else None,
        epoch=operation.epoch,
        started_at=operation.started_at,
        finished_at=operation.finished_at,
        result=operation.result,
        message=operation.message,
        steps=[_step_line(step, hosts_shown=hosts_shown) for step in steps],
    )


def _step_line(step: Step, *, hosts_shown: bool) -> StepLine:
    return StepLine(
        name=step.name,
        participant=step.participant,
        host=step.host if hosts_shown else None,
        started_at=step.started_at,
        finished_at=step.finished_at,
        result=step.result,
        hypervisor_us=step.hypervisor_us or 0,
        task_state=step.task_state,
    )


def finding_line(finding: Finding) -> FindingLine:
    return FindingLine(finding.kind.value, finding.subject, finding.host)


_ORDER = (MoveState.LEFT, MoveState.AGAIN, MoveState.MOVING, MoveState.MOVED)


def drain_view(drain: Drain, moves: Mapping[str, DrainMove], on_host: Collection[str], limit: int) -> DrainView:
    count = Counter(move.status for move in moves.values())
    begun = {one.instance_id for one in moves.values() if one.status is not MoveState.AGAIN}
    ordered = sorted(moves.values(), key=lambda move: (_ORDER.index(move.status), move.instance_id))
    return DrainView(
        host=drain.host,
        mode=drain.mode.value,
        concurrency=drain.concurrency,
        status=drain.status.value,
        started_at=drain.started_at,
        updated_at=drain.updated_at,
        moved=count[MoveState.MOVED],
        moving=count[MoveState.MOVING],
        waiting=len(set(on_host) - begun),
        left=count[MoveState.LEFT],
        servers=[
            DrainLine(move.instance_id, move.status.value, move.how, move.reason, move.attempts)
            for move in ordered[:limit]
        ],
    )
