"""The volume service: rows in the store. What touches data is the business of the storage that it is given.

Called by the Block Storage API (`api.py`) and, through `contract.py`, by the lifecycle; any number of processes have one
over the same database. In a cloud of one process it is `local.LocalVolumes`; elsewhere

    volumes = Volumes(store, settings.volume, images, RemoteStorage(bus, store))     # of an API or a conductor
    owner = VolumeOwner(store, state_dir, settings.volume, images, bus=bus)          # in `instar storage`

Nothing here is read and then written on the strength of it: statements say what must be so when they are carried out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
import structlog

from instar.clock import now_us
from instar.config import VolumeSettings
from instar.errors import BadRequest, Conflict, NotFound, StepTimeout, StorageAway, VolumeFailed, VolumeUnusable
from instar.model.volume import VolumeConnection
from instar.store import volume_attachments as attachment_sql
from instar.store import volume_snapshots as snapshot_sql
from instar.store import volumes as sql
from instar.store.contract import Store
from instar.store.volume_quotas import quota_take, volume_limits, volume_usage
from instar.store.volume_records import ATTACHABLE, AttachmentRecord, SnapshotRecord, VolumeDocument, VolumeRecord, Work
from instar.volumes.contract import SnapshotInfo, VolumeAttachment, VolumeInfo
from instar.volumes.creation import Creation, NewVolume
from instar.volumes.files import checked_id
from instar.volumes.images import VolumeImages
from instar.volumes.reimage import Reimaging
from instar.volumes.storage import Storage, snapshot_subject, volume_subject

log = structlog.get_logger()

FAILED = ("error", "error_deleting", "error_extending", "error_restoring")
_COUNTED = ("volumes", "snapshots", "gigabytes", "per_volume_gigabytes")


class Volumes:
    """Implements `VolumeService`. Nothing is opened or closed: the store and the storage belong to others."""

    participant = "volume"  # in the journal of operations

    def __init__(self, store: Store, settings: VolumeSettings, images: VolumeImages, storage: Storage) -> None:
        self.store = store
        self.settings = settings
        self.images = images
        self.storage = storage
        self.creation = Creation(store, images, settings)
        self._reimaging = Reimaging(store, storage, images)

    # --- volumes ------------------------------------------------------------------------------------------------------

    async def volume_fetch(self, volume_id: str, *, project_id: str, is_admin: bool) -> VolumeInfo:
        return _info(await self.fetch(volume_id, project_id=project_id, is_admin=is_admin))

    async def create(
        self,
        volume_id: str,
        *,
        project_id: str,
        user_id: str,
        size_gib: int,
        name: str,
        image_id: str | None = None,
        snapshot_id: str | None = None,
        source_volume_id: str | None = None,
        volume_type: str | None = None,
        availability_zone: str | None = None,
    ) -> None:
        if await sql.volume_fetch(self.store, volume_id) is not None:
            return
        await self.create_new(
            NewVolume(
                id=volume_id, project_id=project_id, user_id=user_id, size_gib=size_gib, name=name, image_id=image_id,
                snapshot_id=snapshot_id, source_volume_id=source_volume_id, volume_type=volume_type,
                availability_zone=availability_zone,
            )
        )  # fmt: skip

    async def create_new(self, new: NewVolume) -> VolumeRecord:
        """As `create`, of whatever the API can ask for. Raises Conflict where the id is taken."""
        checked_id(new.id, "Volume")
        record = await self.creation.plan(new)
        limits, used = await self.limits(record.project_id), await volume_usage(self.store, record.project_id)
        quota = quota_take(record.project_id, {"volumes": 1, "gigabytes": record.size_gib}, limits, used)
        stands = sql.source_stands(record, BadRequest("What the volume is to be made of is no longer there, or not ready."))
        await self.store.write(*quota, *stands, sql.volume_insert(record))
        await self.storage.wake(volume_subject(record.id))
        return record

    async def limits(self, project_id: str) -> dict[str, int]:
        """What the project may have of each resource; -1 is no limit."""
        settings: dict[str, int] = msgspec.structs.asdict(self.settings)
        return await volume_limits(self.store, {name: settings[name] for name in _COUNTED}, project_id)

    async def until_available(self, volume_id: str, deadline_s: float) -> VolumeInfo:
        try:
            async with asyncio.timeout(deadline_s):
                await self.storage.ended(volume_subject(volume_id))
        except TimeoutError as error:
            raise StepTimeout(what=f"volume {volume_id}", waited_s=deadline_s) from error
        record = await self._volume(volume_id)
        if record.status in FAILED or record.status == "creating":
            raise VolumeFailed(volume_id=volume_id, reason="it could not be made")
        return _info(record)

    async def delete(self, volume_id: str) -> None:
        record = await sql.volume_fetch(self.store, volume_id)
        if record is None:
            return
        await self.delete_begin(record, ("available", "creating", *FAILED, "deleting"))
        await self.storage.ended(volume_subject(volume_id))
        left = await sql.volume_fetch(self.store, volume_id)
        if left is not None and left.status != "deleting":
            raise VolumeFailed(volume_id=volume_id, reason="its data could not be deleted")

    async def delete_begin(self, record: VolumeRecord, allowed: tuple[str, ...]) -> None:
        """The volume is being deleted. Raises VolumeUnusable."""
        refused = VolumeUnusable(
            volume_id=record.id,
            reason=f"its status must be {' or '.join(allowed)}, it must not be attached and must not have snapshots.",
        )
        try:
            await self.store.write(
                sql.volume_hold(record.id),
                sql.volume_status(
                    record.id, before=allowed, after="deleting", work=Work("delete"), error=refused, alone=True
                ),
            )
        except VolumeUnusable:
            if await sql.volume_fetch(self.store, record.id) is None:
                return
            raise
        await self.storage.wake(volume_subject(record.id))

    async def fetch(self, volume_id: str, *, project_id: str, is_admin: bool) -> VolumeRecord:
        """The whole record. Raises NotFound."""
        record = await sql.volume_fetch(self.store, volume_id)
        if record is None or not (is_admin or record.project_id == project_id):
            raise NotFound(kind="Volume", id=volume_id)
        return record

    async def _volume(self, volume_id: str) -> VolumeRecord:
        return await self.fetch(volume_id, project_id="", is_admin=True)

    async def reimage(self, volume_id: str, image_id: str, *, turn: str, deadline_s: float) -> None:
        await self._reimaging.replace(volume_id, image_id, turn=turn, deadline_s=deadline_s)

    async def reimage_undo(self, volume_id: str, *, turn: str, deadline_s: float) -> None:
        await self._reimaging.give_back(volume_id, turn=turn, deadline_s=deadline_s)

    async def reimage_end(self, volume_id: str, image_id: str, *, deadline_s: float) -> None:
        await self._reimaging.let_go(volume_id, image_id, deadline_s=deadline_s)

    # --- attachments --------------------------------------------------------------------------------------------------

    async def reserve(self, attachment_id: str, volume_id: str, *, instance_id: str, alone: bool = False) -> None:
        await self.attachment_new(attachment_id, volume_id, instance_id=instance_id, alone=alone)

    async def attachment_new(
        self, attachment_id: str, volume_id: str, *, instance_id: str, read_only: bool = False, alone: bool = False
    ) -> AttachmentRecord:
        """As `reserve`. Raises Conflict where the id belongs to another attachment."""
        before = await attachment_sql.attachment_fetch(self.store, attachment_id)
        if before is not None:
            if (before.volume_id, before.instance_id) != (volume_id, instance_id):
                raise Conflict(f"Attachment {attachment_id} exists already.")
            return before
        volume = await self._volume(volume_id)
        refused = VolumeUnusable(
            volume_id=volume_id,
            reason=f"its status must be available{'' if alone else ' (or in-use, when it is multiattach)'}, "
            f"but it is {volume.status}.",
        )
        record = AttachmentRecord(
            id=attachment_id, volume_id=volume_id, instance_id=instance_id, status="reserved",
            read_only=read_only or volume.read_only, created_at=now_us(), project_id=volume.project_id,
            alone=alone,
        )  # fmt: skip
        await self.store.write(*attachment_sql.attachment_reserve(record, refused))
        return record

    async def connect(self, attachment_id: str, *, host: str, host_ip: str, device: str) -> VolumeConnection:
        attachment = await self._attachment(attachment_id)
        # The record first: an export that is served after a crash must have a reason to be.
        await self.store.write(*attachment_sql.attachment_connect(attachment, host=host, device=device))
        return await self.storage.serve(attachment_id, host_ip=host_ip)

    async def complete(self, attachment_id: str) -> None:
        attachment = await self._attachment(attachment_id)
        if attachment.status != "attached":
            await self.store.write(*attachment_sql.attachment_complete(attachment))

    async def mark_detaching(self, attachment_id: str, *, detaching: bool, alone: bool = False) -> None:
        attachment = await self._attachment(attachment_id)
        before, after = ("attached", "detaching") if detaching else ("detaching", "attached")
        if attachment.status == after:
            return
        refused = VolumeUnusable(
            volume_id=attachment.volume_id, reason=f"its attachment must be {before}, but it is {attachment.status}."
            if not alone or attachment.status != before
            else "it has more than one read/write attachment.",
        )
        marked = attachment_sql.attachment_mark(attachment, before=before, after=after, error=refused, alone=alone)
        try:
            await self.store.write(*marked)
        except VolumeUnusable:
            if (await self._attachment(attachment_id)).status != after:
                raise

    async def detach(self, attachment_id: str, *, keep_reservation: bool = False) -> None:
        attachment = await attachment_sql.attachment_fetch(self.store, attachment_id)
        if attachment is None:
            return
        if keep_reservation:
            await self.store.write(*attachment_sql.attachment_release(attachment))
        else:
            await self.store.write(*attachment_sql.attachment_delete(attachment))
        await self.stop_serving(attachment.volume_id)

    async def stop_serving(self, volume_id: str) -> None:
        """As the contract says. While the storage is away nobody ends the export: the storage does when it starts."""
        try:
            await self.storage.release(volume_id)
        except StorageAway:
            log.warning("volume.served_on", volume=volume_id)

    async def writers(self, volume_id: str) -> int:
        return sum(not one.read_only for one in await attachment_sql.attachments_of_volume(self.store, volume_id))

    async def served_in_vain(self) -> tuple[str, ...]:
        served = await self.storage.served()
        wanted = {one.volume_id for one in await attachment_sql.attachments_connected(self.store)}
        return tuple(volume_id for volume_id in served if volume_id not in wanted)

    async def attachments(self, instance_id: str | None = None) -> tuple[VolumeAttachment, ...]:
        return tuple(
            VolumeAttachment(one.id, one.volume_id, one.instance_id, one.status, one.host, one.device)
            for one in await attachment_sql.attachments_of_instance(self.store, instance_id)
        )

    async def _attachment(self, attachment_id: str) -> AttachmentRecord:
        record = await attachment_sql.attachment_fetch(self.store, attachment_id)
        if record is None:
            raise NotFound(kind="Volume attachment", id=attachment_id)
        return record

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def snapshot_fetch(self, snapshot_id: str, *, project_id: str, is_admin: bool) -> SnapshotInfo:
        return _snapshot_info(await self.fetch_snapshot(snapshot_id, project_id=project_id, is_admin=is_admin))

    async def fetch_snapshot(self, snapshot_id: str, *, project_id: str, is_admin: bool) -> SnapshotRecord:
        """The whole record. Raises NotFound."""
        record = await snapshot_sql.snapshot_fetch(self.store, snapshot_id)
        if record is None or not (is_admin or record.project_id == project_id):
            raise NotFound(kind="Snapshot", id=snapshot_id)
        return record

    async def snapshot_create(
        self, snapshot_id: str, volume_id: str, *, project_id: str, user_id: str, name: str, deadline_s: float
    ) -> SnapshotInfo:
        if await snapshot_sql.snapshot_fetch(self.store, snapshot_id) is None:
            await self.snapshot_new(
                snapshot_id, await self._volume(volume_id), project_id=project_id, user_id=user_id, name=name, force=True
            )
        try:
            async with asyncio.timeout(deadline_s):
                await self.storage.ended(snapshot_subject(snapshot_id))
        except TimeoutError as error:
            raise StepTimeout(what=f"snapshot {snapshot_id}", waited_s=deadline_s) from error
        record = await self.fetch_snapshot(snapshot_id, project_id="", is_admin=True)
        if record.status != "available":
            raise VolumeFailed(volume_id=volume_id, reason="its snapshot could not be made")
        return _snapshot_info(record)

    async def snapshot_new(
        self, snapshot_id: str, volume: VolumeRecord, *, project_id: str, user_id: str, name: str | None,
        description: str | None = None, metadata: Mapping[str, str] | None = None, force: bool = False,
    ) -> SnapshotRecord:  # fmt: skip
        """A snapshot that is being made; `force`: also of a volume that is attached. Raises VolumeUnusable, QuotaExceeded,
        Conflict (the id)."""
        checked_id(snapshot_id, "Snapshot")
        allowed = ATTACHABLE if force else ("available",)
        document = VolumeDocument(dict(metadata or {}), volume.document.image_metadata, volume.bootable)
        record = SnapshotRecord(
            id=snapshot_id, volume_id=volume.id, project_id=project_id, user_id=user_id, name=name, description=description,
            status="creating", size_gib=volume.size_gib, document=document, work=Work("create"), created_at=now_us(),
        )  # fmt: skip
        refused = VolumeUnusable(
            volume_id=volume.id, reason=f"its status must be {' or '.join(allowed)}, but it is {volume.status}."
        )
        limits, used = await self.limits(project_id), await volume_usage(self.store, project_id)
        quota = quota_take(project_id, {"snapshots": 1, "gigabytes": volume.size_gib}, limits, used)
        await self.store.write(*quota, *snapshot_sql.snapshot_insert(record, allowed, refused))
        await self.storage.wake(snapshot_subject(snapshot_id))
        return record

    async def snapshot_delete(self, snapshot_id: str) -> None:
        record = await snapshot_sql.snapshot_fetch(self.store, snapshot_id)
        if record is None:
            return
        await self.snapshot_delete_begin(record, ("available", "creating", "error", "error_deleting", "deleting"))
        await self.storage.ended(snapshot_subject(snapshot_id))

    async def snapshot_delete_begin(self, record: SnapshotRecord, allowed: tuple[str, ...]) -> None:
        """The snapshot is being deleted. Raises VolumeUnusable."""
        refused = VolumeUnusable(
            volume_id=record.volume_id, reason=f"snapshot {record.id} must be {' or '.join(allowed)}, not {record.status}."
        )
        await self.store.write(
            snapshot_sql.snapshot_status(record.id, before=allowed, after="deleting", work=Work("delete"), error=refused)
        )
        await self.storage.wake(snapshot_subject(record.id))


def _info(record: VolumeRecord) -> VolumeInfo:
    metadata = record.document.image_metadata
    return VolumeInfo(
        id=record.id,
        name=record.name or "",
        status=record.status,
        size_gib=record.size_gib,
        bootable=record.bootable,
        multiattach=record.multiattach,
        project_id=record.project_id,
        availability_zone=record.availability_zone,
        image_metadata=metadata,
        min_disk_gib=_number(metadata.get("min_disk")),
        min_ram_mib=_number(metadata.get("min_ram")),
    )


def _snapshot_info(record: SnapshotRecord) -> SnapshotInfo:
    document = record.document
    return SnapshotInfo(
        record.id, record.volume_id, record.status, record.size_gib, document.bootable, document.image_metadata
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
