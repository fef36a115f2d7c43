"""What a new volume will be: its source looked at, its size, type and metadata settled. Called by `service.py`.

Nothing is written here: what is returned goes, with its quota, into one transaction.
"""

from __future__ import annotations

import secrets

import msgspec

from instar.clock import now_us
from instar.config import VolumeSettings
from instar.errors import BadRequest, NotFound, QuotaExceeded
from instar.store import volume_snapshots as snapshot_sql
from instar.store import volumes as sql
from instar.store.contract import Store
from instar.store.volume_records import ATTACHABLE, SnapshotRecord, VolumeDocument, VolumeRecord, Work
from instar.volumes.files import GIB
from instar.volumes.images import SourceImage, VolumeImages
from instar.volumes.types import DEFAULT_TYPE, type_find

ZONE = "nova"
SIZE_MAX_GIB = 1 << 20  # a petabyte: qcow2 files grow further, nobody's disk does
EXPORT_RANDOM_BYTES = 24


class NewVolume(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. `size_gib` 0: the size of the source."""

    id: str
    project_id: str
    user_id: str
    is_admin: bool = False
    size_gib: int = 0
    name: str | None = None
    description: str | None = None
    image_id: str | None = None
    snapshot_id: str | None = None
    source_volume_id: str | None = None
    volume_type: str | None = None
    availability_zone: str | None = None
    metadata: dict[str, str] = {}


class _Source(msgspec.Struct, frozen=True):
    """`size_gib`: what the volume has to have at least."""

    size_gib: int = 0
    size_is_default: bool = False  # the source has a size that a volume can take over
    bootable: bool = False
    image_metadata: dict[str, str] = {}
    type_id: str | None = None


class Creation:
    def __init__(self, store: Store, images: VolumeImages, settings: VolumeSettings) -> None:
        self._store = store
        self._images = images
        self._settings = settings

    async def plan(self, new: NewVolume) -> VolumeRecord:
        """The record of a volume to be made. Raises BadRequest, and QuotaExceeded for one larger than any may be."""
        if sum(one is not None for one in (new.image_id, new.snapshot_id, new.source_volume_id)) > 1:
            raise BadRequest("A volume is made of an image, a snapshot or a volume, not of several of them.")
        source = await self._source(new)
        size_gib = new.size_gib or (source.size_gib if source.size_is_default else 0)
        self.check_size(size_gib)
        if size_gib < source.size_gib:
            raise BadRequest(
                f"Invalid input received: Volume size {size_gib}GB cannot be smaller than the {source.size_gib}GB "
                "that its source needs."
            )
        wanted = new.volume_type or source.type_id or DEFAULT_TYPE
        try:
            kind = await type_find(self._store, wanted, new.project_id, is_admin=new.is_admin or not new.volume_type)
        except NotFound as error:
            raise BadRequest(f"Invalid volume_type provided: {wanted!r} could not be found.") from error
        return VolumeRecord(
            id=new.id,
            project_id=new.project_id,
            user_id=new.user_id,
            name=new.name,
            description=new.description,
            status="creating",
            size_gib=size_gib,
            type_id=kind.id,
            availability_zone=new.availability_zone or ZONE,
            bootable=source.bootable,
            multiattach=kind.multiattach,
            image_id=new.image_id,
            snapshot_id=new.snapshot_id,
            source_volume_id=new.source_volume_id,
            export=secrets.token_urlsafe(EXPORT_RANDOM_BYTES),
            document=VolumeDocument(metadata=new.metadata, image_metadata=source.image_metadata),
            work=Work("create"),
            created_at=now_us(),
        )

    def check_size(self, size_gib: int) -> None:
        """Raises BadRequest for what is no size, QuotaExceeded for more than one volume may have."""
        if not 1 <= size_gib <= SIZE_MAX_GIB:
            raise BadRequest(
                f"Invalid input received: Volume size '{size_gib}' must be an integer from 1 to {SIZE_MAX_GIB}."
            )
        limit = self._settings.per_volume_gigabytes
        if 0 <= limit < size_gib:
            raise QuotaExceeded(resource="per_volume_gigabytes", requested=size_gib, used=0, limit=limit)

    async def _source(self, new: NewVolume) -> _Source:
        if new.image_id is not None:
            return await self._of_image(new, new.image_id)
        if new.snapshot_id is not None:
            snapshot = await self._of_snapshot(new, new.snapshot_id)
            volume = await sql.volume_fetch(self._store, snapshot.volume_id)
            return _Source(
                snapshot.size_gib, True, snapshot.document.bootable, snapshot.document.image_metadata,
                volume.type_id if volume else None,
            )  # fmt: skip
        if new.source_volume_id is not None:
            record = await self._of_volume(new, new.source_volume_id)
            return _Source(record.size_gib, True, record.bootable, record.document.image_metadata, record.type_id)
        return _Source()

    async def _of_image(self, new: NewVolume, image_id: str) -> _Source:
        try:
            image = await self._images.image_fetch(image_id, project_id=new.project_id, is_admin=new.is_admin)
        except NotFound as error:
            raise BadRequest(f"Invalid image identifier or unable to access requested image: {image_id}.") from error
        if image.status != "active":
            raise BadRequest(f"Image {image_id} is not active: its status is {image.status}.")
        needed_gib = max(image.min_disk_gib, -(-image.virtual_size_bytes // GIB))
        return _Source(needed_gib, False, True, image_metadata(image))

    async def _of_snapshot(self, new: NewVolume, snapshot_id: str) -> SnapshotRecord:
        record = await snapshot_sql.snapshot_fetch(self._store, snapshot_id)
        if record is None or not (new.is_admin or record.project_id == new.project_id):
            raise BadRequest(f"Snapshot {snapshot_id} could not be found.")
        if record.status != "available":
            raise BadRequest(f"Snapshot {snapshot_id} cannot be used: its status is {record.status}, not available.")
        return record

    async def _of_volume(self, new: NewVolume, volume_id: str) -> VolumeRecord:
        record = await sql.volume_fetch(self._store, volume_id)
        if record is None or not (new.is_admin or record.project_id == new.project_id):
            raise BadRequest(f"Volume {volume_id} could not be found.")
        if record.status not in ATTACHABLE:
            raise BadRequest(f"Volume {volume_id} cannot be used: its status is {record.status}, not available or in-use.")
        return record


def image_metadata(image: SourceImage) -> dict[str, str]:
    """What a volume remembers of its image, all as text: `volume_image_metadata` of the API."""
    return {
        **image.properties,
        "image_id": image.id,
        "image_name": image.name,
        "disk_format": image.disk_format,
        "container_format": "bare",
        "min_disk": str(image.min_disk_gib),
        "min_ram": str(image.min_ram_mib),
        "size": str(image.size_bytes),
    }
