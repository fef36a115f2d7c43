"""SQL of migrations: the records of moves. Operations write them in their own transactions; the API lists them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from instar.clock import now_us
from instar.errors import InstarError
from instar.model.guest import MigrationProgress
from instar.model.move import IN_PROGRESS, Migration, MoveStatus, MoveType, migration_from_row
from instar.model.operation import Operation
from instar.store.contract import Statement, Store, Value
from instar.store.quotas import counting_lock

_IN_PROGRESS = ", ".join(f"'{status.value}'" for status in sorted(IN_PROGRESS))


def migration_insert(
    uuid: str,
    operation: Operation,
    kind: MoveType,
    *,
    source: str,
    dest: str | None,
    old_flavor_id: str,
    new_flavor_id: str,
    status: MoveStatus,
) -> tuple[Statement, ...]:
    """Recorded once for its uuid; again changes nothing. Numbers are given in turn, whoever begins a move meanwhile."""
    insert = Statement(
        """INSERT INTO moves (id, uuid, instance_id, operation_id, type, status, source_host, dest_host,
             old_flavor_id, new_flavor_id, user_id, project_id, created_at, updated_at, progress)
           VALUES ((SELECT COALESCE(MAX(m.id), 0) + 1 FROM moves m), :uuid, :instance_id, :operation_id, :type,
             :status, :source, :dest, :old_flavor_id, :new_flavor_id, :user_id, :project_id, :now, :now, :progress)
           ON CONFLICT (uuid) DO NOTHING""",
        {
            "uuid": uuid, "instance_id": operation.instance_id, "operation_id": operation.id, "type": kind.value,
            "status": status.value, "source": source, "dest": dest, "old_flavor_id": old_flavor_id,
            "new_flavor_id": new_flavor_id, "user_id": operation.user_id, "project_id": operation.project_id,
            "now": now_us(), "progress": msgspec.msgpack.encode(MigrationProgress()),
        },
    )  # fmt: skip
    return counting_lock("moves"), insert


def migration_status(uuid: str, status: MoveStatus, *, dest: str | None = None) -> Statement:
    """How far the move is; `dest` once the host is known."""
    return Statement(
        "UPDATE moves SET status = :status, updated_at = :now, dest_host = COALESCE(:dest, dest_host) WHERE uuid = :uuid",
        {"uuid": uuid, "status": status.value, "now": now_us(), "dest": dest},
    )


def migration_goes_on(uuid: str, status: MoveStatus, *, dest: str | None, aborted: InstarError) -> Statement:
    """As `migration_status`, unless the move was aborted meanwhile: raises `aborted` then. Again changes nothing."""
    return Statement(
        "UPDATE moves SET status = :status, updated_at = :now, dest_host = COALESCE(:dest, dest_host) "
        "WHERE uuid = :uuid AND status <> :cancelled",
        {
            "uuid": uuid, "status": status.value, "now": now_us(), "dest": dest,
            "cancelled": MoveStatus.CANCELLED.value,
        },
        1,
        aborted,
    )  # fmt: skip


def migration_abort_early(uuid: str) -> Statement:
    """A move that has not begun to run is not to begin. Raises WriteConflict for one that runs, or has ended."""
    return Statement(
        "UPDATE moves SET status = :cancelled, updated_at = :now WHERE uuid = :uuid AND status IN (:queued, :preparing)",
        {
            "uuid": uuid, "now": now_us(), "cancelled": MoveStatus.CANCELLED.value, "queued": MoveStatus.QUEUED.value,
            "preparing": MoveStatus.PREPARING.value,
        },
        1,
    )  # fmt: skip


def migration_found(instance_id: str, dest: str, status: MoveStatus) -> Statement:
    """The instance's last live migration to this host has ended so, as was found out later."""
    return Statement(
        "UPDATE moves SET status = :status, updated_at = :now WHERE id = (SELECT MAX(m.id) FROM moves m "
        "WHERE m.instance_id = :id AND m.type = :type AND m.dest_host = :dest)",
        {"id": instance_id, "type": MoveType.LIVE.value, "dest": dest, "status": status.value, "now": now_us()},
    )


def migrations_end(instance_id: str, status: MoveStatus) -> Statement:
    """Whatever is in progress for the instance has ended so."""
    return Statement(
        "UPDATE moves SET status = :status, updated_at = :now "  # noqa: S608 - constants only
        f"WHERE instance_id = :id AND status IN ({_IN_PROGRESS})",
        {"id": instance_id, "status": status.value, "now": now_us()},
    )


def work_progress(instance_id: str, epoch: int, percent: int) -> Statement:
    """How far the operation is that runs under this epoch; nothing once it has ended."""
    return Statement(
        """UPDATE instances SET progress = :percent WHERE id = :id AND epoch = :epoch
           AND EXISTS (SELECT 1 FROM operations o WHERE o.instance_id = :id AND o.finished_at IS NULL)""",
        {"id": instance_id, "epoch": epoch, "percent": percent},
    )


def migration_progress(instance_id: str, progress: MigrationProgress) -> Statement:
    return Statement(
        "UPDATE moves SET progress = :progress, updated_at = :now "  # noqa: S608 - constants only
        f"WHERE instance_id = :id AND status IN ({_IN_PROGRESS})",
        {"id": instance_id, "progress": msgspec.msgpack.encode(progress), "now": now_us()},
    )


async def migrations_list(
    store: Store, where: Sequence[str], params: dict[str, Value], *, limit: int
) -> list[Migration]:
    """Newest first. `where` are conditions on columns of the table, their values in `params`."""
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    rows = await store.read(
        f"SELECT * FROM moves {condition} ORDER BY created_at DESC, id DESC LIMIT :limit",  # noqa: S608 - conditions are the API's own
        {**params, "limit": limit},
    )
    return [migration_from_row(row) for row in rows]  # type: ignore[arg-type]


async def migration_fetch(store: Store, uuid: str) -> Migration | None:
    rows = await store.read("SELECT * FROM moves WHERE uuid = :uuid", {"uuid": uuid})
    return migration_from_row(rows[0]) if rows else None  # type: ignore[arg-type]


async def migrations_of_instance(store: Store, instance_id: str) -> list[Migration]:
    """All moves of the instance, newest first."""
    rows = await store.read(
        "SELECT * FROM moves WHERE instance_id = :id ORDER BY created_at DESC, id DESC", {"id": instance_id}
    )
    return [migration_from_row(row) for row in rows]  # type: ignore[arg-type]
