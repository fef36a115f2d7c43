"""Images that operations on instances make (snapshots, backups, shelved disks), in the database. Called by instar.images.

Their data is written by a host, not sent by a client: while that goes on the status is `saving` and the upload id is the
image's own id, which no client's upload can have. So both kinds of uploads are told apart after a crash.
"""

from __future__ import annotations

from instar.errors import Conflict
from instar.store.contract import Statement, Store
from instar.store.images import ImageRecord, image_fetch, image_insert


async def instance_image_insert(store: Store, record: ImageRecord, instance_id: str | None) -> None:
    """A queued image for an instance. The same again, deleted or not, changes nothing. Raises Conflict: another's id."""
    try:
        await image_insert(store, record, instance_id=instance_id)
    except Conflict:
        rows = await store.read("SELECT owner, instance_id FROM images WHERE id = :id", {"id": record.id})
        if not rows or (rows[0]["owner"], rows[0]["instance_id"]) != (record.owner, instance_id):
            raise


async def instance_image_begin(store: Store, image_id: str, *, now: int) -> ImageRecord | None:
    """A host may write the data of the image from now on; again: nothing changes. None where the image is gone.

    Raises Conflict where it has data, or a client is uploading some."""
    await store.write(
        Statement(
            "UPDATE images SET status = 'saving', upload_id = id, updated_at = :now, revision = revision + 1 "
            "WHERE id = :id AND status = 'queued' AND deleted_at IS NULL",
            {"id": image_id, "now": now},
        )
    )
    record = await image_fetch(store, image_id)
    if record is not None and not await instance_image_saving(store, image_id):
        raise Conflict(f"Image {image_id} is {record.status}: its data is not taken.")
    return record


async def instance_image_saving(store: Store, image_id: str) -> bool:
    """A host may be writing the data of this image."""
    rows = await store.read(
        "SELECT id FROM images WHERE id = :id AND status = 'saving' AND upload_id = id AND deleted_at IS NULL",
        {"id": image_id},
    )
    return bool(rows)


async def instance_image_all_saving(store: Store) -> set[str]:
    """Ids of all images whose data a host may be writing."""
    rows = await store.read("SELECT id FROM images WHERE status = 'saving' AND upload_id = id AND deleted_at IS NULL")
    return {row["id"] for row in rows}


async def instance_image_unfinished(store: Store) -> dict[str, str]:
    """Image id → instance id of what is still without data."""
    rows = await store.read(
        "SELECT id, instance_id FROM images WHERE instance_id IS NOT NULL AND status IN ('queued', 'saving') "
        "AND deleted_at IS NULL"
    )
    return {row["id"]: row["instance_id"] for row in rows}


async def instance_image_backups(store: Store, instance_id: str, backup_type: str) -> list[str]:
    """Ids of the instance's backups of that type that have their data, newest first."""
    rows = await store.read(
        "SELECT i.id FROM images i JOIN image_properties p ON p.image_id = i.id AND p.name = 'backup_type' "
        "JOIN image_properties t ON t.image_id = i.id AND t.name = 'image_type' WHERE i.instance_id = :instance_id "
        "AND p.value = :backup_type AND t.value = 'backup' AND i.status = 'active' AND i.deleted_at IS NULL "
        "ORDER BY i.created_at DESC, i.id DESC",
        {"instance_id": instance_id, "backup_type": backup_type},
    )
    return [row["id"] for row in rows]
