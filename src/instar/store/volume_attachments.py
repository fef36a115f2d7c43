"""SQL of volumes' attachments. Called by instar.volumes.

A volume's status says what is being done to it, or, when nothing is, what its attachments are: `status_follow` is in
every transaction that changes one of them.
"""

from __future__ import annotations

from instar.clock import now_us
from instar.errors import InstarError, NotFound
from instar.store.contract import Statement, Store, Value
from instar.store.volume_records import (
    ATTACHABLE_SQL,
    ATTACHMENT_COLUMNS,
    AttachmentRecord,
    attachment_from_row,
    insert_record,
)
from instar.store.volumes import volume_hold

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
    """Attach a volume that is available, or shared, or has this very instance already. Nobody shares one that an attachment
    has alone, and who is to have it alone does not share it. Raises `error`."""
    nobody = "NOT EXISTS (SELECT 1 FROM volume_attachments a WHERE a.volume_id = :volume_id"
    shares = f"multiattach = 1 AND {nobody}{'' if record.alone else ' AND a.alone = 1'})"
    return (
        volume_hold(record.volume_id),
        Statement(
            f"""UPDATE volumes SET updated_at = :now WHERE id = :volume_id AND status IN ({ATTACHABLE_SQL})
                  AND (({shares}) OR {nobody} AND (a.instance_id <> :instance_id OR a.instance_id = '')))""",  # noqa: S608
            {"volume_id": record.volume_id, "instance_id": record.instance_id, "now": record.created_at},
            rows=1,
            error=error,
        ),
        insert_record("volume_attachments", record, ATTACHMENT_COLUMNS, None),
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
        "attached_at = CASE WHEN status = 'attached' THEN attached_at ELSE CAST(:now AS BIGINT) END, status = 'attached', "
        "alone = 0"
    )
    return _attachment_write(attachment, assignments, {"now": now_us()}, error=_gone(attachment))


def attachment_mark(
    attachment: AttachmentRecord, *, before: str, after: str, error: InstarError, alone: bool = False
) -> tuple[Statement, ...]:
    """status `before` → `after`. Raises `error` where it is another one; `alone`: or where others may write to the volume,
    which nobody else gets from then on."""
    params: dict[str, Value] = {"before": before, "after": after, "alone": int(alone)}
    condition = " AND status = :before"
    if alone:
        condition += (
            " AND NOT EXISTS (SELECT 1 FROM volume_attachments o WHERE o.volume_id = volume_attachments.volume_id"
            " AND o.id <> volume_attachments.id AND o.read_only = 0)"
        )
    return _attachment_write(attachment, "status = :after, alone = :alone", params, condition=condition, error=error)


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
              status_before = CASE WHEN status IN ({ATTACHABLE_SQL}) THEN status_before ELSE {derived} END,
              status = CASE WHEN status IN ({ATTACHABLE_SQL}) THEN {derived} ELSE status END
            WHERE id = :id""",  # noqa: S608 - constants
        {"id": volume_id, "now": now_us()},
    )
