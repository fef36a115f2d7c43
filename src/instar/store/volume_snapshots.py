"""SQL of volumes' snapshots. Called by instar.volumes."""

from __future__ import annotations

from instar.clock import now_us
from instar.errors import Conflict, InstarError
from instar.store.conditions import any_of
from instar.store.contract import Statement, Store, Value
from instar.store.volume_records import (
    SNAPSHOT_COLUMNS,
    SnapshotRecord,
    VolumeDocument,
    Work,
    insert_record,
    set_columns,
    set_document,
    snapshot_from_row,
    work_value,
)


def snapshot_insert(record: SnapshotRecord, allowed: tuple[str, ...], error: InstarError) -> tuple[Statement, ...]:
    """A snapshot of a volume that has one of the allowed statuses and the snapshot's size, else `error` is raised."""
    params: dict[str, Value] = {"id": record.volume_id, "now": record.created_at, "size": record.size_gib}
    is_allowed = any_of("status", allowed, params, "b")
    return (
        Statement(
            f"UPDATE volumes SET updated_at = :now WHERE id = :id AND {is_allowed} AND size_gib = :size",  # noqa: S608
            params,
            rows=1,
            error=error,
            alone=f"volume {record.volume_id}",
        ),
        insert_record("volume_snapshots", record, SNAPSHOT_COLUMNS, Conflict(f"A snapshot {record.id} exists already.")),
    )


async def snapshot_fetch(store: Store, snapshot_id: str) -> SnapshotRecord | None:
    rows = await store.read("SELECT * FROM volume_snapshots WHERE id = :id", {"id": snapshot_id})
    return snapshot_from_row(rows[0]) if rows else None


async def snapshots_with_work(store: Store) -> list[SnapshotRecord]:
    rows = await store.read("SELECT * FROM volume_snapshots WHERE work IS NOT NULL ORDER BY created_at")
    return [snapshot_from_row(row) for row in rows]


async def snapshot_statuses(store: Store) -> dict[str, str]:
    return {row["id"]: row["status"] for row in await store.read("SELECT id, status FROM volume_snapshots")}


def snapshot_status(
    snapshot_id: str, *, before: tuple[str, ...], after: str, work: Work | None, error: InstarError
) -> Statement:
    """status → `after` with `work`, where it is one of `before`."""
    params: dict[str, Value] = {"id": snapshot_id, "after": after, "work": work_value(work), "now": now_us()}
    is_before = any_of("status", before, params, "b")
    return Statement(
        "UPDATE volume_snapshots SET status = :after, work = :work, updated_at = :now "  # noqa: S608
        f"WHERE id = :id AND {is_before}",
        params,
        rows=1,
        error=error,
    )


def snapshot_work_done(snapshot_id: str, work: Work, status: str) -> Statement:
    """As `volume_work_done`."""
    return Statement(
        "UPDATE volume_snapshots SET status = :status, work = NULL, updated_at = :now WHERE id = :id AND work = :work",
        {"id": snapshot_id, "work": work_value(work), "status": status, "now": now_us()},
    )


def snapshot_columns(snapshot_id: str, **columns: Value) -> Statement:
    """These columns get these values. Raises NotFound where there is no such snapshot."""
    return set_columns("volume_snapshots", "Snapshot", snapshot_id, columns)


def snapshot_document(record: SnapshotRecord, document: VolumeDocument, error: InstarError) -> Statement:
    """A new document, unless somebody else changed the one that it was made of: then `error` is raised."""
    return set_document("volume_snapshots", record, document, error)


def snapshot_delete(snapshot_id: str) -> Statement:
    return Statement("DELETE FROM volume_snapshots WHERE id = :id", {"id": snapshot_id})


async def snapshots_of_volume(store: Store, volume_id: str) -> list[SnapshotRecord]:
    rows = await store.read("SELECT * FROM volume_snapshots WHERE volume_id = :id ORDER BY created_at", {"id": volume_id})
    return [snapshot_from_row(row) for row in rows]
