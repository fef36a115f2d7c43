"""Rows of volumes, snapshots and attachments, and how they stand in the database. Used by the SQL of each of them.

`work` is what the service has yet to do; it is written together with the status that announces it, and cleared together
with the one that ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from instar.clock import now_us
from instar.errors import InstarError, NotFound
from instar.store.contract import Row, Statement, Value

ATTACHABLE = ("available", "reserved", "attaching", "in-use", "detaching")
ATTACHABLE_SQL = ", ".join(f"'{one}'" for one in ATTACHABLE)


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
    """`project_id` is that of the volume: it is read with the row, not stored. `alone`: as long as it is so, nobody else
    gets the volume, although it can be shared."""

    id: str
    volume_id: str
    instance_id: str
    status: str
    host: str = ""
    device: str = ""
    read_only: bool = False
    created_at: int
    attached_at: int | None = None
    alone: bool = False
    project_id: str = ""


_DOCUMENT = msgspec.json.Decoder(VolumeDocument)
_WORK = msgspec.json.Decoder(Work)
_FLAGS = ("bootable", "multiattach", "read_only", "alone")
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


def insert_record(
    table: str, record: msgspec.Struct, columns: tuple[str, ...], duplicate: InstarError | None
) -> Statement:
    """A new row. Raises `duplicate`."""
    names = ", ".join(columns)
    marks = ", ".join(f":{name}" for name in columns)
    sql = f"INSERT INTO {table} ({names}) VALUES ({marks})"  # noqa: S608 - constants
    return Statement(sql, _values(record, columns), duplicate=duplicate)


def set_columns(table: str, kind: str, record_id: str, columns: Mapping[str, Value]) -> Statement:
    """These columns of a row get these values. Raises NotFound, of a `kind`, where there is no such row."""
    return Statement(
        f"UPDATE {table} SET {', '.join(f'{name} = :{name}' for name in columns)}, updated_at = :now WHERE id = :id",  # noqa: S608
        {"id": record_id, "now": now_us(), **columns},
        rows=1,
        error=NotFound(kind=kind, id=record_id),
    )


def set_document(
    table: str, record: VolumeRecord | SnapshotRecord, document: VolumeDocument, error: InstarError
) -> Statement:
    """A new document, unless somebody else changed the one that it was made of: then `error` is raised."""
    return Statement(
        f"UPDATE {table} SET document = :document, updated_at = :now WHERE id = :id AND document = :was",  # noqa: S608
        {
            "id": record.id, "document": msgspec.json.encode(document), "now": now_us(),
            "was": msgspec.json.encode(record.document),
        },
        rows=1,
        error=error,
    )  # fmt: skip


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
