"""Images in the database: rows, labels and members. Called by instar.images; files are not this room's matter.

Every change is a compare-and-swap: on the revision for what users edit, on status and upload id for what uploads do.
Listing with its filters and paging is in `image_queries.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from instar.errors import Conflict, NotFound
from instar.store.contract import Row, Statement, Store, Value
from instar.store.quotas import counting_lock

MEMBERS_MAX = 128  # projects that one image is shared with

COLUMNS = (
    "id, name, status, owner, visibility, container_format, disk_format, min_disk_gib, min_ram_mib, protected, hidden, "
    "size_bytes, virtual_size_bytes, md5, sha256, sha512, document, revision, created_at, updated_at"
)


class ImageRecord(msgspec.Struct, frozen=True):
    """An image that is not deleted. Times in microseconds since the epoch; sizes and hashes: None without data."""

    id: str
    name: str | None
    status: str
    owner: str | None
    visibility: str
    container_format: str | None
    disk_format: str | None
    created_at: int
    updated_at: int
    min_disk_gib: int = 0
    min_ram_mib: int = 0
    protected: bool = False
    hidden: bool = False
    size_bytes: int | None = None
    virtual_size_bytes: int | None = None
    md5: str | None = None
    sha256: str | None = None
    sha512: str | None = None
    revision: int = 0
    properties: dict[str, str] = {}
    tags: tuple[str, ...] = ()


class StoredData(msgspec.Struct, frozen=True):
    """What is known of an image's data once it is inspected and stored. Hashes in hexadecimal; None: not known yet."""

    size_bytes: int
    virtual_size_bytes: int
    md5: str | None
    sha256: str | None
    sha512: str | None


class MemberRecord(msgspec.Struct, frozen=True):
    """A project that an image is shared with. `status` is pending, accepted or rejected."""

    image_id: str
    project_id: str
    status: str
    created_at: int
    updated_at: int


class _Document(msgspec.Struct, frozen=True):
    properties: dict[str, str]
    tags: tuple[str, ...]


_decoder = msgspec.json.Decoder(_Document)


def image_from_row(row: Row) -> ImageRecord:
    document = _decoder.decode(row["document"])
    return ImageRecord(
        id=row["id"],
        name=row["name"],
        status=row["status"],
        owner=row["owner"],
        visibility=row["visibility"],
        container_format=row["container_format"],
        disk_format=row["disk_format"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        min_disk_gib=row["min_disk_gib"],
        min_ram_mib=row["min_ram_mib"],
        protected=bool(row["protected"]),
        hidden=bool(row["hidden"]),
        size_bytes=row["size_bytes"],
        virtual_size_bytes=row["virtual_size_bytes"],
        md5=row["md5"],
        sha256=row["sha256"],
        sha512=row["sha512"],
        revision=row["revision"],
        properties=document.properties,
        tags=document.tags,
    )


def _edited(record: ImageRecord) -> dict[str, Value]:
    """The columns that users edit; what an upload writes is not among them."""
    return {
        "id": record.id,
        "name": record.name,
        "owner": record.owner,
        "visibility": record.visibility,
        "container_format": record.container_format,
        "disk_format": record.disk_format,
        "min_disk_gib": record.min_disk_gib,
        "min_ram_mib": record.min_ram_mib,
        "protected": int(record.protected),
        "hidden": int(record.hidden),
        "document": msgspec.json.encode(_Document(record.properties, record.tags)),
        "updated_at": record.updated_at,
    }


def _labels(record: ImageRecord) -> list[Statement]:
    properties = [
        Statement(
            "INSERT INTO image_properties (image_id, name, value) VALUES (:id, :name, :value)",
            {"id": record.id, "name": name, "value": value},
        )
        for name, value in record.properties.items()
    ]
    tags = [
        Statement("INSERT INTO image_tags (image_id, tag) VALUES (:id, :tag)", {"id": record.id, "tag": tag})
        for tag in record.tags
    ]
    return properties + tags


def _without_labels(image_id: str) -> list[Statement]:
    return [
        Statement("DELETE FROM image_properties WHERE image_id = :id", {"id": image_id}),
        Statement("DELETE FROM image_tags WHERE image_id = :id", {"id": image_id}),
    ]


async def image_fetch(store: Store, image_id: str) -> ImageRecord | None:
    """The image, or None where there is none (any more)."""
    rows = await store.read(
        f"SELECT {COLUMNS} FROM images WHERE id = :id AND deleted_at IS NULL",  # noqa: S608 - a constant of this module
        {"id": image_id},
    )
    return image_from_row(rows[0]) if rows else None


async def image_insert(store: Store, record: ImageRecord, *, instance_id: str | None = None) -> None:
    """A new image without data, perhaps made for an instance. Raises Conflict for an id that was ever used."""
    params: dict[str, Value] = _edited(record) | {
        "status": record.status, "created_at": record.created_at, "instance_id": instance_id,
    }
    await store.write(
        Statement(
            "INSERT INTO images (id, name, status, owner, visibility, container_format, disk_format, min_disk_gib, "
            "min_ram_mib, protected, hidden, document, revision, created_at, updated_at, instance_id) VALUES (:id, :name, "
            ":status, :owner, :visibility, :container_format, :disk_format, :min_disk_gib, :min_ram_mib, :protected, "
            ":hidden, :document, 0, :created_at, :updated_at, :instance_id)",
            params,
            duplicate=Conflict(f"Image ID {record.id} already exists!"),
        ),
        *_labels(record),
    )


async def image_update(store: Store, record: ImageRecord) -> bool:
    """Write what a user edited, made from the revision that `record` still carries. False: someone else was faster."""
    moved = Conflict(f"Image {record.id} was changed by someone else in the meantime.")
    update = Statement(
        "UPDATE images SET name = :name, owner = :owner, visibility = :visibility, container_format = "
        ":container_format, disk_format = :disk_format, min_disk_gib = :min_disk_gib, min_ram_mib = :min_ram_mib, "
        "protected = :protected, hidden = :hidden, document = :document, updated_at = :updated_at, "
        "revision = revision + 1 WHERE id = :id AND revision = :revision AND deleted_at IS NULL",
        _edited(record) | {"revision": record.revision},
        rows=1,
        error=moved,
    )
    try:
        await store.write(update, *_without_labels(record.id), *_labels(record))
    except Conflict as error:
        if error is not moved:
            raise
        return False
    return True


async def image_switch(store: Store, image_id: str, *, now: int, before: str, after: str) -> bool:
    """Status from `before` to `after`; False where it was another one."""
    [result] = await store.write(
        Statement(
            "UPDATE images SET status = :after, updated_at = :now, revision = revision + 1 "
            "WHERE id = :id AND status = :before AND deleted_at IS NULL",
            {"id": image_id, "before": before, "after": after, "now": now},
        )
    )
    return result.rowcount == 1


async def image_delete(store: Store, image_id: str, *, now: int, even_protected: bool = False) -> str | None:
    """The image is gone for good; returns the sha256 of its data. Raises Conflict where it is gone or protected."""
    [deleted, *_] = await store.write(
        Statement(
            "UPDATE images SET status = 'deleted', deleted_at = :now, updated_at = :now, upload_id = NULL, "
            "revision = revision + 1 WHERE id = :id AND deleted_at IS NULL AND (protected = 0 OR :even_protected = 1) "
            "RETURNING sha256",
            {"id": image_id, "now": now, "even_protected": int(even_protected)},
            rows=1,
            error=Conflict(f"Image {image_id} was deleted or protected by someone else in the meantime."),
        ),
        *_without_labels(image_id),
        Statement("DELETE FROM image_members WHERE image_id = :id", {"id": image_id}),
    )
    sha256: str | None = deleted.rows[0]["sha256"]
    return sha256


# --- uploads --------------------------------------------------------------------------------------------------------


async def image_upload_begin(store: Store, image_id: str, upload_id: str, *, revision: int, now: int) -> None:
    """The upload owns the image until it ends. Raises Conflict where it has data, another upload, or was changed."""
    await store.write(
        Statement(
            "UPDATE images SET status = 'saving', upload_id = :upload_id, updated_at = :now, revision = revision + 1 "
            "WHERE id = :id AND status = 'queued' AND revision = :revision AND deleted_at IS NULL",
            {"id": image_id, "upload_id": upload_id, "revision": revision, "now": now},
            rows=1,
            error=Conflict(f"Image {image_id} is not queued, or was changed in the meantime: its data is not taken."),
        )
    )


async def image_upload_finish(store: Store, image_id: str, upload_id: str, data: StoredData, *, now: int) -> None:
    """The data belongs to the image, which is active. Raises NotFound where it was deleted meanwhile."""
    params: dict[str, Any] = {"id": image_id, "upload_id": upload_id, "now": now, **msgspec.structs.asdict(data)}
    await store.write(
        Statement(
            "UPDATE images SET status = 'active', upload_id = NULL, size_bytes = :size_bytes, virtual_size_bytes = "
            ":virtual_size_bytes, md5 = :md5, sha256 = :sha256, sha512 = :sha512, updated_at = :now, "
            "revision = revision + 1 WHERE id = :id AND upload_id = :upload_id AND status = 'saving'",
            params,
            rows=1,
            error=NotFound(kind="Image", id=image_id),
        )
    )


async def image_upload_abort(store: Store, upload_id: str, *, now: int) -> None:
    """The upload failed: its image is queued again, if it still is this upload's."""
    await store.write(
        Statement(
            "UPDATE images SET status = 'queued', upload_id = NULL, updated_at = :now, revision = revision + 1 "
            "WHERE upload_id = :upload_id AND status = 'saving'",
            {"upload_id": upload_id, "now": now},
        )
    )


async def image_uploads_open(store: Store) -> list[str]:
    """Ids of the uploads that clients are sending, as far as the rows know: the process may be dead.

    What a host writes (see instance_images.py) is not among them: the operation that waits for it goes on, or ends it."""
    rows = await store.read("SELECT upload_id FROM images WHERE status = 'saving' AND upload_id <> id")
    return [row["upload_id"] for row in rows]


async def image_unnamed(store: Store) -> set[str]:
    """Ids of the images that have data of which the SHA-256 is not known yet."""
    rows = await store.read(
        "SELECT id FROM images WHERE size_bytes IS NOT NULL AND sha256 IS NULL AND deleted_at IS NULL"
    )
    return {row["id"] for row in rows}


async def image_name_data(store: Store, image_id: str, sha256: str) -> bool:
    """That is the SHA-256 of the image's data. No change that anybody made, so revision and time stay. False where the
    image is gone, or it was known."""
    [result] = await store.write(
        Statement(
            "UPDATE images SET sha256 = :sha256 WHERE id = :id AND size_bytes IS NOT NULL AND sha256 IS NULL "
            "AND deleted_at IS NULL",
            {"id": image_id, "sha256": sha256},
        )
    )
    return result.rowcount == 1


async def image_data_names(store: Store) -> set[str]:
    """The sha256 of all data that an image uses."""
    rows = await store.read("SELECT DISTINCT sha256 FROM images WHERE sha256 IS NOT NULL AND deleted_at IS NULL")
    return {row["sha256"] for row in rows}


async def image_data_used(store: Store, sha256: str) -> bool:
    rows = await store.read(
        "SELECT id FROM images WHERE sha256 = :sha256 AND deleted_at IS NULL LIMIT 1", {"sha256": sha256}
    )
    return bool(rows)


async def image_checksums_missing(store: Store) -> list[str]:
    """The sha256 of all data of which the other hashes are not known yet."""
    rows = await store.read(
        "SELECT DISTINCT sha256 FROM images WHERE sha256 IS NOT NULL AND (sha512 IS NULL OR md5 IS NULL) "
        "AND deleted_at IS NULL"
    )
    return [row["sha256"] for row in rows]


async def image_checksums_set(store: Store, sha256: str, *, md5: str, sha512: str) -> None:
    """Of all images with that data. No change that anybody made, so revision and time stay."""
    await store.write(
        Statement(
            "UPDATE images SET md5 = :md5, sha512 = :sha512 WHERE sha256 = :sha256 AND deleted_at IS NULL",
            {"sha256": sha256, "md5": md5, "sha512": sha512},
        )
    )


async def image_fetch_registered(store: Store, name: str) -> list[ImageRecord]:
    """Images of that name that belong to no project, oldest first."""
    rows = await store.read(
        f"SELECT {COLUMNS} FROM images WHERE name = :name AND owner IS NULL "  # noqa: S608 - constant
        "AND deleted_at IS NULL ORDER BY created_at, id",
        {"name": name},
    )
    return [image_from_row(row) for row in rows]


# --- members --------------------------------------------------------------------------------------------------------


def _member(row: Row) -> MemberRecord:
    return MemberRecord(row["image_id"], row["project_id"], row["status"], row["created_at"], row["updated_at"])


async def image_member_fetch(store: Store, image_id: str, project_id: str) -> MemberRecord | None:
    rows = await store.read(
        "SELECT * FROM image_members WHERE image_id = :id AND project_id = :project_id",
        {"id": image_id, "project_id": project_id},
    )
    return _member(rows[0]) if rows else None


async def image_member_list(store: Store, image_id: str) -> list[MemberRecord]:
    rows = await store.read(
        "SELECT * FROM image_members WHERE image_id = :id ORDER BY created_at, project_id", {"id": image_id}
    )
    return [_member(row) for row in rows]


async def image_member_insert(store: Store, member: MemberRecord) -> bool:
    """False where the image has MEMBERS_MAX members. Raises Conflict for a project that is a member already."""
    _, result = await store.write(
        counting_lock(f"image_members:{member.image_id}"),
        Statement(
            "INSERT INTO image_members (image_id, project_id, status, created_at, updated_at) "
            "SELECT id, :project_id, :status, CAST(:created_at AS BIGINT), CAST(:updated_at AS BIGINT) "
            "FROM images WHERE id = :image_id "
            "AND deleted_at IS NULL AND (SELECT COUNT(*) FROM image_members WHERE image_id = :image_id) < :most",
            {**msgspec.structs.asdict(member), "most": MEMBERS_MAX},
            duplicate=Conflict(f"Project {member.project_id} is already a member of image {member.image_id}."),
        )
    )
    return result.rowcount == 1


async def image_member_update(store: Store, member: MemberRecord) -> None:
    """Write the member's status. Raises NotFound where it is no member any more."""
    await store.write(
        Statement(
            "UPDATE image_members SET status = :status, updated_at = :updated_at "
            "WHERE image_id = :image_id AND project_id = :project_id",
            {
                "image_id": member.image_id,
                "project_id": member.project_id,
                "status": member.status,
                "updated_at": member.updated_at,
            },
            rows=1,
            error=NotFound(kind="Member", id=member.project_id),
        )
    )


async def image_member_delete(store: Store, image_id: str, project_id: str) -> None:
    """Raises NotFound where it is no member."""
    await store.write(
        Statement(
            "DELETE FROM image_members WHERE image_id = :id AND project_id = :project_id",
            {"id": image_id, "project_id": project_id},
            rows=1,
            error=NotFound(kind="Member", id=project_id),
        )
    )
