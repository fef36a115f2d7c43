"""SQL of operations and their journal, and of the outbox of notifications. Conductors are in `conductors.py`.

Rows are locked in one order, by all who write: the operation (with which each step's transaction begins, as its guard),
what else a step writes (moves, console tokens, what a project uses), and the instance at last. So none of them waits for
another in a circle.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from instar.clock import now_us
from instar.errors import InstarError, TaskStateConflict
from instar.model.operation import Notification, Operation, Step, operation_from_row, step_from_row
from instar.model.states import TaskState
from instar.store.contract import Statement, Store, Value

REMOVED_AT_ONCE = (1, 2, 4, 8, 16, 32)  # told notifications
# Where it is known by its id or its instance's whether an operation is unfinished: as an expression. As the condition of
# the index of all that are unfinished it would have PostgreSQL walk through that, with what has left it since a vacuum: a
# plan that is made while there are few of them, and kept.
_UNFINISHED = "COALESCE({0}finished_at, 0) = 0"

_INSERT = """
INSERT INTO operations (id, instance_id, action, rule, request_id, user_id, project_id, turn, vm_state_before,
    arguments, owner, epoch, cancelled_by, started_at, updated_at, finished_at, result, message)
SELECT :id, :instance_id, :action, :rule, :request_id, :user_id, :project_id, i.turn, :vm_state_before,
    :arguments, NULL, 0, NULL, :started_at, :updated_at, :finished_at, :result, :message
FROM instances i WHERE i.id = :instance_id
"""
# What a cancellation before the instance was held has not seen.
_NONE_CAME = f""" AND NOT EXISTS (SELECT 1 FROM operations o WHERE o.instance_id = :instance_id
    AND {_UNFINISHED.format('o.')} AND o.cancelled_by IS NULL AND o.action <> 'delete')
"""  # noqa: S608 - constants only


def operation_insert(operation: Operation, *, takes_over: bool = False) -> Statement:
    """Record an operation; its turn is the instance's, which stands before it in the same transaction. `takes_over`: from
    all that `operations_cancel` has told; raises CameBetween for one that it has missed."""
    names = (
        "id", "instance_id", "action", "rule", "request_id", "user_id", "project_id", "vm_state_before", "arguments",
        "started_at", "updated_at", "finished_at", "result", "message",
    )  # fmt: skip
    params = {name: getattr(operation, name) for name in names}
    if takes_over:
        return Statement(_INSERT + _NONE_CAME, params, rows=1, error=CameBetween())
    return Statement(_INSERT, params, rows=1)


class CameBetween(InstarError):
    """Another operation was accepted in the moment in which one took over from all that there were: nothing was written,
    and it may be tried again."""


def operations_cancel(instance_id: str, by: Operation) -> Statement:
    """Tell whatever is in flight on the instance that `by` takes over. A delete is never taken over. Stands before all that
    writes the instance."""
    return Statement(
        """UPDATE operations SET cancelled_by = :by, updated_at = :now
           WHERE instance_id = :instance_id AND finished_at IS NULL AND id <> :id AND action <> 'delete'""",
        {"instance_id": instance_id, "id": by.id, "by": by.action, "now": now_us()},
    )


_TAKE = f"""UPDATE operations SET owner = :owner, updated_at = :now,
      epoch = (SELECT i.epoch + 1 FROM instances i WHERE i.id = operations.instance_id)
    WHERE id = :id AND owner IS NOT DISTINCT FROM :from_owner AND {_UNFINISHED.format('')}
      AND NOT EXISTS (SELECT 1 FROM operations o WHERE o.instance_id = operations.instance_id
                      AND {_UNFINISHED.format('o.')} AND o.turn < operations.turn)
    RETURNING *"""  # noqa: S608 - constants only


def operation_take(operation_id: str, owner: str, *, from_owner: str | None) -> Statement:
    """Own an operation, under a new epoch, when no older one of the instance is unfinished.

    Changes no row where another conductor was quicker. `instance_take_epoch` follows in the same transaction."""
    return Statement(
        _TAKE,
        {"id": operation_id, "owner": owner, "from_owner": from_owner, "now": now_us()},
        rows=1,
    )


_GUARD = (
    f"UPDATE operations SET updated_at = :now "  # noqa: S608 - constants only
    f"WHERE id = :id AND owner = :owner AND epoch = :epoch AND {_UNFINISHED.format('')}"
)
_GUARD_FORWARD = f"{_GUARD} AND cancelled_by IS NULL"


def operation_guard(operation: Operation, *, forward: bool) -> Statement:
    """Only the owner of the current epoch may write; `forward` also asks that nobody has taken over the instance."""
    return Statement(
        _GUARD_FORWARD if forward else _GUARD,
        {"id": operation.id, "owner": operation.owner, "epoch": operation.epoch, "now": now_us()},
        rows=1,
        error=GuardRefused(),
    )


class GuardRefused(InstarError):
    """The operation is no longer this conductor's, or was taken over. The engine reads which."""


def operation_finish(operation_id: str, *, result: str, message: str | None, forget: bool = False) -> Statement:
    """Returns `next_id`: the operation of the instance that waited for this one, if any; a statement before it must have
    written the instance's row, else one that is accepted at this moment would not be seen. `forget` wipes its arguments."""
    wiped = ", arguments = :nothing" if forget else ""
    nothing: dict[str, Value] = {"nothing": b"\xc0"} if forget else {}
    return Statement(
        f"""UPDATE operations SET finished_at = :now, updated_at = :now, result = :result, message = :message{wiped}
           WHERE id = :id
           RETURNING (SELECT n.id FROM operations n WHERE n.instance_id = operations.instance_id
                        AND {_UNFINISHED.format('n.')} AND n.id <> operations.id ORDER BY n.turn LIMIT 1) AS next_id""",  # noqa: S608
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
        Statement(f"DELETE FROM moves WHERE instance_id IN ({old})", params),  # noqa: S608
        Statement("DELETE FROM instances WHERE deleted <> 0 AND terminated_at < :before", params),
    )


# --- the journal --------------------------------------------------------------------------------------------------


_STEP_START = """INSERT INTO steps (operation_id, seq, name, participant, host, started_at, finished_at, result, output,
     error, traceback, hypervisor_us, task_state)
   {values} :operation_id, :seq, :name, :participant, :host, :started_at, NULL, NULL, NULL,
     NULL, NULL, NULL, :task_state {end}"""
_STEP_START_ALWAYS = _STEP_START.format(values="VALUES (", end=")")
_STEP_START_DURING = _STEP_START.format(
    values="SELECT", end="FROM instances i WHERE i.id = :instance_id AND i.task_state IS NOT DISTINCT FROM :during"
)


def step_start(step: Step) -> Statement:
    return Statement(_STEP_START_ALWAYS, _started(step), rows=1)


def step_start_during(step: Step, instance_id: str, task: TaskState | None) -> Statement:
    """The same of a step that changes nothing of the instance. Raises TaskStateConflict where another task_state stands
    than this: so the row, which is in many indexes, is not written anew just to see that nobody else changed it."""
    during = {"instance_id": instance_id, "during": task.value if task else None}
    refusal = TaskStateConflict(id=instance_id, expected=task.value if task else "none")
    return Statement(_STEP_START_DURING, _started(step) | during, 1, refusal)


def _started(step: Step) -> dict[str, Value]:
    return {
        "operation_id": step.operation_id, "seq": step.seq, "name": step.name, "participant": step.participant,
        "host": step.host, "started_at": step.started_at, "task_state": step.task_state,
    }  # fmt: skip


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


# --- the outbox ---------------------------------------------------------------------------------------------------


def notification_insert(notification: Notification, owner: str | None = None) -> Statement:
    """`owner`: the conductor that publishes it. Without one, or when it is gone, the keeper does."""
    return Statement(
        "INSERT INTO notifications (id, body, owner) VALUES (:id, :body, :owner)",
        {"id": notification.message_id, "body": msgspec.msgpack.encode(notification), "owner": owner or ""},
        rows=1,
    )


def notifications_remove(message_ids: Sequence[str]) -> list[Statement]:
    """In a few sizes, filled up with the last one, so that these are a few texts however many there are."""
    statements = []
    for start in range(0, len(message_ids), REMOVED_AT_ONCE[-1]):
        some = list(message_ids[start : start + REMOVED_AT_ONCE[-1]])
        size = next(size for size in REMOVED_AT_ONCE if size >= len(some))
        some += some[-1:] * (size - len(some))
        params: dict[str, Value] = {f"i{number}": message_id for number, message_id in enumerate(some)}
        names = ", ".join(f":{name}" for name in params)
        statements.append(Statement(f"DELETE FROM notifications WHERE id IN ({names})", params))  # noqa: S608 - our names
    return statements


async def notifications_fetch(store: Store, limit: int, owner: str | None = None) -> list[tuple[str, bytes]]:
    """The oldest of an owner that were not told yet; None: those of nobody who is registered. Ids are ordered by time."""
    whose = "owner = :owner" if owner is not None else "owner NOT IN (SELECT c.id FROM conductors c)"
    params: dict[str, Value] = {"limit": limit}
    rows = await store.read(
        f"SELECT id, body FROM notifications WHERE {whose} ORDER BY id LIMIT :limit",  # noqa: S608 - one of two constants
        params | ({"owner": owner} if owner is not None else {}),
    )
    return [(row["id"], row["body"]) for row in rows]
