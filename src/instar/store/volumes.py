"""SQL of volumes, snapshots and attachments. Called by instar.volumes.

A volume's status says what is being done to it, or, when nothing is, what its attachments are: `status_follow` is in
every transaction that changes one of them. `work` is what the service has yet to do; it is written together with the
status that announces it, and cleared together with the one that ends it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from instar.clock import now_us
from instar.errors import Conflict, InstarError, NotFound
from instar.store.contract import Row, Statement, Store, Value

ATTACHABLE = ("available", "reserved", "attaching", "in-use", "detaching")
_ATTACHABLE_SQL = ", ".join(f"'{one}'" for one in ATTACHABLE)


class Work(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the service has yet to do. `kind` create|delete|extend|upload|revert|reimage|reimage-undo|reimage-end; the rest
    is for the kinds named."""

    kind: str
    size_gib: int = 0  # extend
    image_id: str = ""  # upload, reimage, reimage-end
    disk_format: str = ""  # upload
    snapshot_id: str = ""  # revert
    turn: str = ""  # reimage, reimage-undo: what the replaced data is kept under


class VolumeDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    metadata: dict[str, str] = {}
    image_metadata: dict[str, str] = {}
    bootable: bool = False  # of a snapshot: whether its volume was
    reimaged: str = ""  # its data was replaced, and what it had is kept under this turn


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A row. Times are microseconds since the epoch."""

    id: str
    project_id: str
    user_id: str
    name: str | None
    description: str | None
    status: str
    status_before: str = "available"
    size_gib: int
    type_id: str
    availability_zone: str
    bootable: bool = False
    multiattach: bool = False
    read_only: bool = False
    image_id: str | None = None
    snapshot_id: str | None = None
    source_volume_id: str | None = None
    export: str
    document: VolumeDocument = VolumeDocument()
    work: Work | None = None
    created_at: int
    updated_at: int | None = None


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    volume_id: str
    project_id: str
    user_id: str
    name: str | None
    description: str | None
    status: str
    size_gib: int
    document: VolumeDocument = VolumeDocument()
    work: Work | None = None
    created_at: int
    updated_at: int | None = None


class AttachmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`project_id` is that of the volume: it is read with the row, not stored."""

    id: str
    volume_id: str
    instance_id: str
    status: str
    host: str = ""
    device: str = ""
    read_only: bool = False
    created_at: int
    attached_at: int | None = None
    project_id: str = ""


_DOCUMENT = msgspec.json.Decoder(VolumeDocument)
_WORK = msgspec.json.Decoder(Work)
_FLAGS = ("bootable", "multiattach", "read_only")
VOLUME_COLUMNS = VolumeRecord.__struct_fields__
SNAPSHOT_COLUMNS = SnapshotRecord.__struct_fields__
ATTACHMENT_COLUMNS = tuple(name for name in AttachmentRecord.__struct_fields__ if name != "project_id")


def _values(record: msgspec.Struct, columns: tuple[str, ...]) -> dict[str, Value]:
    values: dict[str, Any] = {name: getattr(record, name) for name in columns}
    for name in _FLAGS:
        if name in values:
            values[name] = int(values[name])
    if "document" in values:
        values["document"] = msgspec.json.encode(values["document"])
        values["work"] = work_value(values["work"])
    return values


def work_value(work: Work | None) -> bytes | None:
    """How `work` stands in its column."""
    return None if work is None else msgspec.json.encode(work)


def _insert(table: str, record: msgspec.Struct, columns: tuple[str, ...], duplicate: InstarError | None) -> Statement:
    names = ", ".join(columns)
    marks = ", ".join(f":{name}" for name in columns)
    sql = f"INSERT INTO {table} ({names}) VALUES ({marks})"  # noqa: S608 - constants
    return Statement(sql, _values(record, columns), duplicate=duplicate)


def _decoded(row: Row, columns: tuple[str, ...]) -> dict[str, Any]:
    values = {name: row[name] for name in columns}
    for name in _FLAGS:
        if name in values:
            values[name] = bool(values[name])
    if "document" in values:
        values["document"] = _DOCUMENT.decode(values["document"])
        values["work"] = None if values["work"] is None else _WORK.decode(values["work"])
    return values


def volume_from_row(row: Row) -> VolumeRecord:
    return VolumeRecord(**_decoded(row, VOLUME_COLUMNS))


def snapshot_from_row(row: Row) -> SnapshotRecord:
    return SnapshotRecord(**_decoded(row, SNAPSHOT_COLUMNS))


def attachment_from_row(row: Row) -> AttachmentRecord:
    return AttachmentRecord(**_decoded(row, ATTACHMENT_COLUMNS), project_id=row["project_id"])


# --- volumes --------------------------------------------------------------------------------------------------------


def volume_insert(record: VolumeRecord) -> Statement:
    duplicate = Conflict(f"A volume {record.id} exists already.")
    return _insert("volumes", record, VOLUME_COLUMNS, duplicate)


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
    marks = ", ".join(f":b{number}" for number in range(len(before)))
    free = (
        " AND NOT EXISTS (SELECT 1 FROM volume_attachments WHERE volume_id = :id)"
        " AND NOT EXISTS (SELECT 1 FROM volume_snapshots WHERE volume_id = :id)"
        if alone
        else ""
    )
    return Statement(
        "UPDATE volumes SET status_before = status, status = :after, work = :work, updated_at = :now "  # noqa: S608
        f"WHERE id = :id AND status IN ({marks}) AND (:size < 0 OR size_gib = :size){free}",
        {
            "id": volume_id, "after": after, "work": work_value(work), "now": now_us(),
            "size": -1 if size_gib is None else size_gib,
            **{f"b{number}": one for number, one in enumerate(before)},
        },
        rows=1,
        error=error,
        alone=f"volume {volume_id}" if alone else None,
    )  # fmt: skip


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
    return Statement(
        f"UPDATE volumes SET {', '.join(f'{name} = :{name}' for name in columns)}, updated_at = :now WHERE id = :id",  # noqa: S608
        {"id": volume_id, "now": now_us(), **columns},
        rows=1,
        error=NotFound(kind="Volume", id=volume_id),
    )


def volume_columns_if(volume_id: str, statuses: tuple[str, ...], error: InstarError, **columns: Value) -> Statement:
    """As `volume_columns`, of a volume that has one of these statuses. Raises `error`."""
    marks = ", ".join(f":b{number}" for number in range(len(statuses)))
    return Statement(
        f"UPDATE volumes SET {', '.join(f'{name} = :{name}' for name in columns)}, updated_at = :now "  # noqa: S608
        f"WHERE id = :id AND status IN ({marks})",
        {"id": volume_id, "now": now_us(), **columns, **{f"b{number}": one for number, one in enumerate(statuses)}},
        rows=1,
        error=error,
    )


def volume_document(record: VolumeRecord, document: VolumeDocument, error: InstarError) -> Statement:
    """A new document, unless somebody else changed the one that it was made of."""
    return Statement(
        "UPDATE volumes SET document = :document, updated_at = :now WHERE id = :id AND document = :was",
        {
            "id": record.id, "document": msgspec.json.encode(document), "now": now_us(),
            "was": msgspec.json.encode(record.document),
        },
        rows=1,
        error=error,
    )  # fmt: skip


def source_stands(record: VolumeRecord, error: InstarError) -> tuple[Statement, ...]:
    """What the volume is made of is still there, and as it must be, when the volume's row is inserted. Raises `error`."""
    if record.snapshot_id is not None:
        sql = "UPDATE volume_snapshots SET updated_at = updated_at WHERE id = :id AND status = 'available'"
        return (Statement(sql, {"id": record.snapshot_id}, rows=1, error=error),)
    if record.source_volume_id is not None:
        sql = f"UPDATE volumes SET updated_at = updated_at WHERE id = :id AND status IN ({_ATTACHABLE_SQL})"  # noqa: S608
        return (Statement(sql, {"id": record.source_volume_id}, rows=1, error=error),)
    return ()


def volume_delete(volume_id: str) -> Statement:
    """The row goes; what was made of it only remembers its id."""
    return Statement("DELETE FROM volumes WHERE id = :id", {"id": volume_id})


# --- attachments ----------------------------------------------------------------------------------------------------

_WITH_PROJECT = "SELECT a.*, v.project_id FROM volume_attachments a JOIN volumes v ON v.id = a.volume_id"


async def attachment_fetch(store: Store, attachment_id: str) -> AttachmentRecord | None:
    rows = await store.read(f"{_WITH_PROJECT} WHERE a.id = :id", {"id": attachment_id})
    return attachment_from_row(rows[0]) if rows else None


async def attachments_of_volume(store: Store, volume_id: str) -> list[AttachmentRecord]:
    rows = await store.read(f"{_WITH_PROJECT} WHERE a.volume_id = :id ORDER BY a.created_at, a.id", {"id": volume_id})
    return [attachment_from_row(row) for row in rows]


async def attachments_of_instance(store: Store, instance_id: str | None) -> list[AttachmentRecord]:
    """None: those of all instances."""
    rows = await store.read(
        f"{_WITH_PROJECT} WHERE a.instance_id <> '' AND (:id = '' OR a.instance_id = :id) ORDER BY a.created_at, a.id",
        {"id": instance_id or ""},
    )
    return [attachment_from_row(row) for row in rows]


async def attachments_connected(store: Store) -> list[AttachmentRecord]:
    """Those that have a host: their volumes' data must be served."""
    rows = await store.read(f"{_WITH_PROJECT} WHERE a.host <> '' ORDER BY a.created_at")
    return [attachment_from_row(row) for row in rows]


def attachment_reserve(record: AttachmentRecord, error: InstarError) -> tuple[Statement, ...]:
    """Attach a volume that is available, or shared, or has this very instance already. Raises `error`."""
    return (
        volume_hold(record.volume_id),
        Statement(
            f"""UPDATE volumes SET updated_at = :now WHERE id = :volume_id AND status IN ({_ATTACHABLE_SQL})
                  AND (multiattach = 1 OR NOT EXISTS (SELECT 1 FROM volume_attachments a
                    WHERE a.volume_id = :volume_id AND (a.instance_id <> :instance_id OR a.instance_id = '')))""",  # noqa: S608
            {"volume_id": record.volume_id, "instance_id": record.instance_id, "now": record.created_at},
            rows=1,
            error=error,
        ),
        _insert("volume_attachments", record, ATTACHMENT_COLUMNS, None),
        status_follow(record.volume_id),
    )


def _attachment_write(
    attachment: AttachmentRecord,
    assignments: str,
    params: dict[str, Value],
    *,
    condition: str = "",
    error: InstarError | None,
) -> tuple[Statement, ...]:
    """A change of one attachment, and the volume's status with it; `error` where no row is changed (None: no matter)."""
    sql = f"UPDATE volume_attachments SET {assignments} WHERE id = :id{condition}"  # noqa: S608 - constants
    rows = None if error is None else 1
    return (
        volume_hold(attachment.volume_id),
        Statement(sql, {"id": attachment.id, **params}, rows=rows, error=error),
        status_follow(attachment.volume_id),
    )


def _gone(attachment: AttachmentRecord) -> NotFound:
    return NotFound(kind="Volume attachment", id=attachment.id)


def attachment_update(attachment: AttachmentRecord, **columns: Value) -> tuple[Statement, ...]:
    """These columns get these values, and the volume its status. Raises NotFound where the attachment is gone."""
    assignments = ", ".join(f"{name} = :{name}" for name in columns)
    return _attachment_write(attachment, assignments, columns, error=_gone(attachment))


def attachment_connect(attachment: AttachmentRecord, *, host: str, device: str) -> tuple[Statement, ...]:
    """It has this host; one that was only reserved is attaching. Raises NotFound."""
    assignments = (
        "host = :host, device = :device, status = CASE WHEN status = 'reserved' THEN 'attaching' ELSE status END"
    )
    return _attachment_write(attachment, assignments, {"host": host, "device": device}, error=_gone(attachment))


def attachment_complete(attachment: AttachmentRecord) -> tuple[Statement, ...]:
    """It is attached, since the first time that this was said. Raises NotFound."""
    assignments = (
        "attached_at = CASE WHEN status = 'attached' THEN attached_at ELSE CAST(:now AS BIGINT) END, status = 'attached'"
    )
    return _attachment_write(attachment, assignments, {"now": now_us()}, error=_gone(attachment))


def attachment_mark(
    attachment: AttachmentRecord, *, before: str, after: str, error: InstarError
) -> tuple[Statement, ...]:
    """status `before` → `after`. Raises `error` where it is another one."""
    params: dict[str, Value] = {"before": before, "after": after}
    return _attachment_write(attachment, "status = :after", params, condition=" AND status = :before", error=error)


def attachment_release(attachment: AttachmentRecord) -> tuple[Statement, ...]:
    """It is reserved, and of no host; nothing where it is gone."""
    return _attachment_write(attachment, "host = '', status = 'reserved', attached_at = NULL", {}, error=None)


def attachment_delete(attachment: AttachmentRecord) -> tuple[Statement, ...]:
    return (
        volume_hold(attachment.volume_id),
        Statement("DELETE FROM volume_attachments WHERE id = :id", {"id": attachment.id}),
        status_follow(attachment.volume_id),
    )


def status_follow(volume_id: str) -> Statement:
    """The volume's status is what its attachments say, unless something else is going on with it."""
    has = "EXISTS (SELECT 1 FROM volume_attachments a WHERE a.volume_id = :id AND a.status = '{}')"
    derived = (
        f"CASE WHEN {has.format('detaching')} THEN 'detaching' WHEN {has.format('attaching')} THEN 'attaching' "
        f"WHEN {has.format('attached')} THEN 'in-use' WHEN {has.format('reserved')} THEN 'reserved' ELSE 'available' END"
    )
    return Statement(
        f"""UPDATE volumes SET updated_at = :now,
              status_before = CASE WHEN status IN ({_ATTACHABLE_SQL}) THEN status_before ELSE {derived} END,
              status = CASE WHEN status IN ({_ATTACHABLE_SQL}) THEN {derived} ELSE status END
            WHERE id = :id""",  # noqa: S608 - constants
        {"id": volume_id, "now": now_us()},
    )


# --- snapshots ------------------------------------------------------------------------------------------------------


def snapshot_insert(record: SnapshotRecord, allowed: tuple[str, ...], error: InstarError) -> tuple[Statement, ...]:
    """A snapshot of a volume that has one of the allowed statuses and the snapshot's size, else `error` is raised."""
    marks = ", ".join(f":b{number}" for number in range(len(allowed)))
    return (
        Statement(
            f"UPDATE volumes SET updated_at = :now WHERE id = :id AND status IN ({marks}) AND size_gib = :size",  # noqa: S608
            {
                "id": record.volume_id, "now": record.created_at, "size": record.size_gib,
                **{f"b{number}": one for number, one in enumerate(allowed)},
            },
            rows=1,
            error=error,
            alone=f"volume {record.volume_id}",
        ),
        _insert("volume_snapshots", record, SNAPSHOT_COLUMNS, Conflict(f"A snapshot {record.id} exists already.")),
    )  # fmt: skip


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
    marks = ", ".join(f":b{number}" for number in range(len(before)))
    return Statement(
        "UPDATE volume_snapshots SET status = :after, work = :work, updated_at = :now "  # noqa: S608
        f"WHERE id = :id AND status IN ({marks})",
        {
            "id": snapshot_id, "after": after, "work": work_value(work), "now": now_us(),
            **{f"b{number}": one for number, one in enumerate(before)},
        },
        rows=1,
        error=error,
    )  # fmt: skip


def snapshot_work_done(snapshot_id: str, work: Work, status: str) -> Statement:
    """As `volume_work_done`."""
    return Statement(
        "UPDATE volume_snapshots SET status = :status, work = NULL, updated_at = :now WHERE id = :id AND work = :work",
        {"id": snapshot_id, "work": work_value(work), "status": status, "now": now_us()},
    )


def snapshot_columns(snapshot_id: str, **columns: Value) -> Statement:
    """These columns get these values. Raises NotFound where there is no such snapshot."""
    return Statement(
        f"UPDATE volume_snapshots SET {', '.join(f'{name} = :{name}' for name in columns)}, updated_at = :now "  # noqa: S608
        "WHERE id = :id",
        {"id": snapshot_id, "now": now_us(), **columns},
        rows=1,
        error=NotFound(kind="Snapshot", id=snapshot_id),
    )


def snapshot_document(record: SnapshotRecord, document: VolumeDocument, error: InstarError) -> Statement:
    """A new document, unless somebody else changed the one that it was made of."""
    return Statement(
        "UPDATE volume_snapshots SET document = :document, updated_at = :now WHERE id = :id AND document = :was",
        {
            "id": record.id, "document": msgspec.json.encode(document), "now": now_us(),
            "was": msgspec.json.encode(record.document),
        },
        rows=1,
        error=error,
    )  # fmt: skip


def snapshot_delete(snapshot_id: str) -> Statement:
    return Statement("DELETE FROM volume_snapshots WHERE id = :id", {"id": snapshot_id})


async def snapshots_of_volume(store: Store, volume_id: str) -> list[SnapshotRecord]:
    rows = await store.read("SELECT * FROM volume_snapshots WHERE volume_id = :id ORDER BY created_at", {"id": volume_id})
    return [snapshot_from_row(row) for row in rows]
