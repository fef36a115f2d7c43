"""SQL of volumes. Called by instar.volumes. What hangs on them is in `volume_attachments.py` and `volume_snapshots.py`."""

from __future__ import annotations

from instar.clock import now_us
from instar.errors import Conflict, InstarError
from instar.store.conditions import any_of
from instar.store.contract import Statement, Store, Value
from instar.store.volume_records import (
    ATTACHABLE_SQL,
    VOLUME_COLUMNS,
    VolumeDocument,
    VolumeRecord,
    Work,
    insert_record,
    set_columns,
    set_document,
    volume_from_row,
    work_value,
)


def volume_insert(record: VolumeRecord) -> Statement:
    duplicate = Conflict(f"A volume {record.id} exists already.")
    return insert_record("volumes", record, VOLUME_COLUMNS, duplicate)


async def volume_fetch(store: Store, volume_id: str) -> VolumeRecord | None:
    rows = await store.read("SELECT * FROM volumes WHERE id = :id", {"id": volume_id})
    return volume_from_row(rows[0]) if rows else None


async def volumes_with_work(store: Store) -> list[VolumeRecord]:
    """What the service has yet to do something with, the oldest first."""
    rows = await store.read("SELECT * FROM volumes WHERE work IS NOT NULL ORDER BY created_at")
    return [volume_from_row(row) for row in rows]


async def has_work(store: Store, kind: str, record_id: str) -> bool:
    """Whether something is to be done yet with this `volume` or `snapshot`."""
    table = {"volume": "volumes", "snapshot": "volume_snapshots"}[kind]
    return bool(await store.read(f"SELECT 1 FROM {table} WHERE id = :id AND work IS NOT NULL", {"id": record_id}))  # noqa: S608


async def volume_statuses(store: Store) -> dict[str, str]:
    """Every volume's status."""
    return {row["id"]: row["status"] for row in await store.read("SELECT id, status FROM volumes")}


async def volume_has_snapshots(store: Store, volume_id: str) -> bool:
    rows = await store.read("SELECT 1 FROM volume_snapshots WHERE volume_id = :id LIMIT 1", {"id": volume_id})
    return bool(rows)


def volume_hold(volume_id: str) -> Statement:
    """The volume's row is ours until the commit, so that what comes after sees what others have committed before. Stands
    first wherever rows that hang on a volume are looked at."""
    return Statement("UPDATE volumes SET updated_at = updated_at WHERE id = :id", {"id": volume_id})


def volume_status(
    volume_id: str,
    *,
    before: tuple[str, ...],
    after: str,
    work: Work | None,
    error: InstarError,
    alone: bool = False,
    size_gib: int | None = None,
) -> Statement:
    """status → `after` with `work`, where it is one of `before`; what it was is kept in status_before.

    `alone`: only where nothing hangs on the volume, neither attachment nor snapshot. `size_gib`: only where it still has
    this size."""
    free = (
        " AND NOT EXISTS (SELECT 1 FROM volume_attachments WHERE volume_id = :id)"
        " AND NOT EXISTS (SELECT 1 FROM volume_snapshots WHERE volume_id = :id)"
        if alone
        else ""
    )
    params: dict[str, Value] = {
        "id": volume_id, "after": after, "work": work_value(work), "now": now_us(),
        "size": -1 if size_gib is None else size_gib,
    }  # fmt: skip
    is_before = any_of("status", before, params, "b")
    return Statement(
        "UPDATE volumes SET status_before = status, status = :after, work = :work, updated_at = :now "  # noqa: S608
        f"WHERE id = :id AND {is_before} AND (:size < 0 OR size_gib = :size){free}",
        params,
        rows=1,
        error=error,
        alone=f"volume {volume_id}" if alone else None,
    )


def volume_work_done(volume_id: str, work: Work, status: str | None, **columns: Value) -> Statement:
    """This work has ended: the volume has this status (None: that of before) and these columns. Nothing where the volume is
    gone, or where something else is to be done with it by now."""
    return Statement(
        f"""UPDATE volumes SET status = COALESCE(:status, status_before), work = NULL, updated_at = :now
              {"".join(f", {name} = :{name}" for name in columns)}
            WHERE id = :id AND work = :work""",  # noqa: S608 - names of columns
        {"id": volume_id, "work": work_value(work), "status": status, "now": now_us(), **columns},
    )


def volume_columns(volume_id: str, **columns: Value) -> Statement:
    """These columns get these values. Raises NotFound where there is no such volume."""
    return set_columns("volumes", "Volume", volume_id, columns)


def volume_columns_if(volume_id: str, statuses: tuple[str, ...], error: InstarError, **columns: Value) -> Statement:
    """As `volume_columns`, of a volume that has one of these statuses. Raises `error`."""
    params: dict[str, Value] = {"id": volume_id, "now": now_us(), **columns}
    has_status = any_of("status", statuses, params, "b")
    return Statement(
        f"UPDATE volumes SET {', '.join(f'{name} = :{name}' for name in columns)}, updated_at = :now "  # noqa: S608
        f"WHERE id = :id AND {has_status}",
        params,
        rows=1,
        error=error,
    )


def volume_document(record: VolumeRecord, document: VolumeDocument, error: InstarError) -> Statement:
    """A new document, unless somebody else changed the one that it was made of: then `error` is raised."""
    return set_document("volumes", record, document, error)


def source_stands(record: VolumeRecord, error: InstarError) -> tuple[Statement, ...]:
    """What the volume is made of is still there, and as it must be, when the volume's row is inserted. Raises `error`."""
    if record.snapshot_id is not None:
        sql = "UPDATE volume_snapshots SET updated_at = updated_at WHERE id = :id AND status = 'available'"
        return (Statement(sql, {"id": record.snapshot_id}, rows=1, error=error),)
    if record.source_volume_id is not None:
        sql = f"UPDATE volumes SET updated_at = updated_at WHERE id = :id AND status IN ({ATTACHABLE_SQL})"  # noqa: S608
        return (Statement(sql, {"id": record.source_volume_id}, rows=1, error=error),)
    return ()


def volume_delete(volume_id: str) -> Statement:
    """The row goes; what was made of it only remembers its id."""
    return Statement("DELETE FROM volumes WHERE id = :id", {"id": volume_id})
