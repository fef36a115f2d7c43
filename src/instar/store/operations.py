"""SQL of operations and their journal, of conductors, and of the outbox of notifications."""

from __future__ import annotations

import msgspec

from instar.clock import now_us
from instar.errors import InstarError
from instar.model.operation import Notification, Operation, Step, operation_from_row, step_from_row
from instar.store.contract import Statement, Store, Value

_INSERT = """
INSERT INTO operations (id, instance_id, action, rule, request_id, user_id, project_id, turn, vm_state_before,
    arguments, owner, epoch, cancelled_by, started_at, updated_at, finished_at, result, message)
SELECT :id, :instance_id, :action, :rule, :request_id, :user_id, :project_id, i.turn, :vm_state_before,
    :arguments, NULL, 0, NULL, :started_at, :updated_at, :finished_at, :result, :message
FROM instances i WHERE i.id = :instance_id
"""


def operation_insert(operation: Operation) -> Statement:
    """Record an operation; its turn is the instance's, which stands before it in the same transaction."""
    names = (
        "id", "instance_id", "action", "rule", "request_id", "user_id", "project_id", "vm_state_before", "arguments",
        "started_at", "updated_at", "finished_at", "result", "message",
    )  # fmt: skip
    return Statement(_INSERT, {name: getattr(operation, name) for name in names}, rows=1)


def operations_cancel(instance_id: str, by: Operation) -> Statement:
    """Tell whatever is in flight on the instance that `by` takes over. A delete is never taken over."""
    return Statement(
        """UPDATE operations SET cancelled_by = :by, updated_at = :now
           WHERE instance_id = :instance_id AND finished_at IS NULL AND id <> :id AND action <> 'delete'""",
        {"instance_id": instance_id, "id": by.id, "by": by.action, "now": now_us()},
    )


def operation_take(operation_id: str, owner: str, *, from_owner: str | None) -> Statement:
    """Own an operation, under a new epoch, when no older one of the instance is unfinished.

    Changes no row where another conductor was quicker. The instance's epoch is raised in the same transaction, before."""
    return Statement(
        """UPDATE operations SET owner = :owner, updated_at = :now,
             epoch = (SELECT i.epoch FROM instances i WHERE i.id = operations.instance_id)
           WHERE id = :id AND owner IS NOT DISTINCT FROM :from_owner AND finished_at IS NULL
             AND NOT EXISTS (SELECT 1 FROM operations o WHERE o.instance_id = operations.instance_id
                             AND o.finished_at IS NULL AND o.turn < operations.turn)
           RETURNING *""",
        {"id": operation_id, "owner": owner, "from_owner": from_owner, "now": now_us()},
        rows=1,
    )


def operation_guard(operation: Operation, *, forward: bool) -> Statement:
    """Only the owner of the current epoch may write; `forward` also asks that nobody has taken over the instance."""
    condition = " AND cancelled_by IS NULL" if forward else ""
    return Statement(
        "UPDATE operations SET updated_at = :now "  # noqa: S608 - the condition is one of two constants
        "WHERE id = :id AND owner = :owner AND epoch = :epoch AND finished_at IS NULL" + condition,
        {"id": operation.id, "owner": operation.owner, "epoch": operation.epoch, "now": now_us()},
        rows=1,
        error=GuardRefused(),
    )


class GuardRefused(InstarError):
    """The operation is no longer this conductor's, or was taken over. The engine reads which."""


def operation_finish(operation_id: str, *, result: str, message: str | None, forget: bool = False) -> Statement:
    """Returns `next_id`: the operation of the instance that waited for this one, if any. `forget` wipes its arguments."""
    wiped = ", arguments = :nothing" if forget else ""
    nothing: dict[str, Value] = {"nothing": b"\xc0"} if forget else {}
    return Statement(
        f"""UPDATE operations SET finished_at = :now, updated_at = :now, result = :result, message = :message{wiped}
           WHERE id = :id
           RETURNING (SELECT n.id FROM operations n WHERE n.instance_id = operations.instance_id
                        AND n.finished_at IS NULL AND n.id <> operations.id ORDER BY n.turn LIMIT 1) AS next_id""",  # noqa: S608
        {"id": operation_id, "result": result, "message": message, "now": now_us(), **nothing},
        rows=1,
    )


async def operation_fetch(store: Store, operation_id: str) -> Operation | None:
    rows = await store.read("SELECT * FROM operations WHERE id = :id", {"id": operation_id})
    return operation_from_row(rows[0]) if rows else None  # type: ignore[arg-type]


async def operations_unfinished(store: Store) -> list[Operation]:
    """Everything in flight, oldest turn first."""
    rows = await store.read("SELECT * FROM operations WHERE finished_at IS NULL ORDER BY started_at, turn")
    return [operation_from_row(row) for row in rows]  # type: ignore[arg-type]


async def operations_waiting(store: Store, instance_id: str) -> list[Operation]:
    """Those of the instance that are not at their end, in their order."""
    rows = await store.read(
        "SELECT * FROM operations WHERE instance_id = :id AND finished_at IS NULL ORDER BY turn", {"id": instance_id}
    )
    return [operation_from_row(row) for row in rows]  # type: ignore[arg-type]


async def operations_of_instance(store: Store, instance_id: str) -> list[Operation]:
    """Newest first."""
    rows = await store.read(
        "SELECT * FROM operations WHERE instance_id = :id ORDER BY turn DESC, started_at DESC", {"id": instance_id}
    )
    return [operation_from_row(row) for row in rows]  # type: ignore[arg-type]


def operations_prune(before_us: int) -> tuple[Statement, ...]:
    """Records of instances that were deleted before `before_us` are dropped, and then the instances themselves."""
    old = "SELECT id FROM instances WHERE deleted <> 0 AND terminated_at < :before"
    params: dict[str, Value] = {"before": before_us}
    return (
        Statement(
            "DELETE FROM steps WHERE operation_id IN "  # noqa: S608 - constants only
            f"(SELECT o.id FROM operations o WHERE o.instance_id IN ({old}))",
            params,
        ),
        Statement(f"DELETE FROM operations WHERE instance_id IN ({old})", params),  # noqa: S608
        Statement("DELETE FROM instances WHERE deleted <> 0 AND terminated_at < :before", params),
    )


# --- the journal --------------------------------------------------------------------------------------------------


def step_start(step: Step) -> Statement:
    return Statement(
        """INSERT INTO steps (operation_id, seq, name, participant, host, started_at, finished_at, result, output,
             error, traceback, hypervisor_us, task_state)
           VALUES (:operation_id, :seq, :name, :participant, :host, :started_at, NULL, NULL, NULL,
             NULL, NULL, NULL, :task_state)""",
        {
            "operation_id": step.operation_id, "seq": step.seq, "name": step.name, "participant": step.participant,
            "host": step.host, "started_at": step.started_at, "task_state": step.task_state,
        },
        rows=1,
    )  # fmt: skip


def step_finish(step: Step) -> Statement:
    return Statement(
        """UPDATE steps SET finished_at = :finished_at, result = :result, output = :output, error = :error,
             traceback = :traceback, hypervisor_us = :hypervisor_us
           WHERE operation_id = :operation_id AND seq = :seq""",
        {
            "operation_id": step.operation_id, "seq": step.seq, "finished_at": step.finished_at,
            "result": step.result, "output": step.output, "error": step.error, "traceback": step.traceback,
            "hypervisor_us": step.hypervisor_us,
        },
        rows=1,
    )  # fmt: skip


async def steps_fetch(store: Store, operation_id: str) -> list[Step]:
    """The journal of an operation, in order."""
    rows = await store.read("SELECT * FROM steps WHERE operation_id = :id ORDER BY seq", {"id": operation_id})
    return [step_from_row(row) for row in rows]  # type: ignore[arg-type]


# --- conductors ---------------------------------------------------------------------------------------------------


def conductor_register(conductor_id: str) -> Statement:
    return Statement("INSERT INTO conductors VALUES (:id, 0, :now)", {"id": conductor_id, "now": now_us()}, rows=1)


def conductor_beat(conductor_id: str) -> Statement:
    """A sign of life. Others watch the number move by their own clocks, so no two clocks are ever compared."""
    return Statement("UPDATE conductors SET beat = beat + 1 WHERE id = :id", {"id": conductor_id}, rows=1)


def conductor_remove(conductor_id: str) -> Statement:
    return Statement("DELETE FROM conductors WHERE id = :id", {"id": conductor_id})


async def conductors_fetch(store: Store) -> dict[str, int]:
    """Every registered conductor with its beat."""
    return {row["id"]: row["beat"] for row in await store.read("SELECT id, beat FROM conductors")}


# --- the outbox ---------------------------------------------------------------------------------------------------


def notification_insert(notification: Notification) -> Statement:
    return Statement(
        "INSERT INTO notifications VALUES (:id, :body)",
        {"id": notification.message_id, "body": msgspec.msgpack.encode(notification)},
        rows=1,
    )


def notification_remove(message_id: str) -> Statement:
    return Statement("DELETE FROM notifications WHERE id = :id", {"id": message_id})


async def notifications_fetch(store: Store, limit: int) -> list[tuple[str, bytes]]:
    """The oldest that were not told yet. Ids are ordered by time."""
    rows = await store.read("SELECT id, body FROM notifications ORDER BY id LIMIT :limit", {"limit": limit})
    return [(row["id"], row["body"]) for row in rows]
