"""`POST /volumes/{id}/action`: what is done to a volume. One method an action; the body's only key names it."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from instar.errors import BadRequest, NotFound, VolumeUnusable
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.policy import Policy
from instar.http.request import Request
from instar.http.routing import Route
from instar.store import volume_attachments as attachment_sql
from instar.store import volume_snapshots as snapshot_sql
from instar.store import volumes as sql
from instar.store.contract import Value, WriteConflict
from instar.store.volume_quotas import quota_take, type_list, volume_usage
from instar.store.volume_records import AttachmentRecord, VolumeRecord, Work
from instar.volumes import microversion as since
from instar.volumes import schemas
from instar.volumes.resource import edit, merged, own_volume
from instar.volumes.service import FAILED, Volumes
from instar.volumes.storage import volume_subject
from instar.volumes.types import type_find
from instar.volumes.views import connection_info, timestamp

# What a volume remembers of its image and an image made of it has in fields of its own.
_IMAGE_FIELDS = frozenset({
    "image_id", "image_name", "checksum", "container_format", "disk_format", "min_disk", "min_ram", "size",
})  # fmt: skip
_STATUSES = (
    "creating", "available", "deleting", "error", "error_deleting", "attaching", "detaching", "in-use", "maintenance",
    "reserved", "error_extending", "uploading", "extending", "reverting",
)  # fmt: skip
_DISK_FORMATS = ("raw", "qcow2")

Act = Callable[[Request, VolumeRecord, Any], Awaitable[Answer | None]]


class _Action(NamedTuple):
    policy: str
    body: type[Any] | None
    act: Act
    since: int = 0


class VolumeActions:
    def __init__(self, volumes: Volumes, policy: Policy) -> None:
        self._volumes = volumes
        self._store = volumes.store
        self._policy = policy
        self._actions = {
            "os-extend": _Action("extend", schemas.Extend, self._extend),
            "os-volume_upload_image": _Action("upload", schemas.Upload, self._upload),
            "os-reserve": _Action("attach", None, self._reserve),
            "os-unreserve": _Action("attach", None, self._unreserve),
            "os-attach": _Action("attach", schemas.Attach, self._attach),
            "os-detach": _Action("attach", schemas.Detach, self._detach),
            "os-begin_detaching": _Action("attach", None, self._begin_detaching),
            "os-roll_detaching": _Action("attach", None, self._roll_detaching),
            "os-initialize_connection": _Action("attach", schemas.Connect, self._initialize_connection),
            "os-terminate_connection": _Action("attach", schemas.Connect, self._terminate_connection),
            "os-reset_status": _Action("admin", schemas.ResetStatus, self._reset_status),
            "os-force_delete": _Action("admin", None, self._force_delete),
            "os-force_detach": _Action("admin", schemas.Detach, self._detach),
            "os-update_readonly_flag": _Action("update", schemas.Readonly, self._read_only),
            "os-set_bootable": _Action("update", schemas.Bootable, self._bootable),
            "os-set_image_metadata": _Action("update", schemas.SetImageMetadata, self._set_image_metadata),
            "os-unset_image_metadata": _Action("update", schemas.UnsetImageMetadata, self._unset_image_metadata),
            "os-show_image_metadata": _Action("show", None, self._show_image_metadata),
            "os-retype": _Action("update", schemas.Retype, self._retype),
            "revert": _Action("update", schemas.Revert, self._revert, since.REVERT),
        }

    def routes(self) -> list[Route]:
        return [Route("POST", "/volumes/{volume_id}/action", "volume:volumes:action", self.action)]

    async def action(self, request: Request) -> Answer:
        body = await schemas.read(request, dict[str, Any])
        if len(body) != 1:
            raise BadRequest("Invalid input: the body of an action has one key, the action's name.")
        [(name, given)] = body.items()
        action = self._actions.get(name)
        if action is None or request.microversion < action.since:
            raise BadRequest(f"There is no such action: {name[:100]}")
        self._policy.require(request.context, f"volume:volumes:{action.policy}")
        record = await own_volume(self._volumes, request)
        wanted = None if action.body is None else schemas.convert(given, action.body)
        return await action.act(request, record, wanted) or empty_answer(202)

    # --- size, image, snapshot ----------------------------------------------------------------------------------------

    async def _extend(self, request: Request, record: VolumeRecord, wanted: schemas.Extend) -> None:
        if wanted.new_size <= record.size_gib:
            raise BadRequest(
                f"Invalid input for field/attribute new_size. Value: {wanted.new_size}. "
                f"New size for extend must be greater than current size ({record.size_gib}GB)."
            )
        self._volumes.creation.check_size(wanted.new_size)
        allowed = ("available", "in-use") if request.microversion >= since.EXTEND_IN_USE else ("available",)
        limits = await self._volumes.limits(record.project_id)
        used = await volume_usage(self._store, record.project_id)
        more = {"gigabytes": wanted.new_size - record.size_gib}
        # The new size counts at once: two who extend must not both see the last room.
        await self._store.write(
            *quota_take(record.project_id, more, limits, used),
            sql.volume_status(
                record.id, before=allowed, after="extending", work=Work("extend", size_gib=record.size_gib),
                error=_refused(record, allowed), size_gib=record.size_gib,
            ),
            sql.volume_columns(record.id, size_gib=wanted.new_size),
        )  # fmt: skip
        await self._volumes.storage.wake(volume_subject(record.id))

    async def _upload(self, request: Request, record: VolumeRecord, wanted: schemas.Upload) -> Answer:
        if wanted.disk_format not in _DISK_FORMATS:
            raise BadRequest(
                f"Invalid input for field/attribute disk_format. Value: {wanted.disk_format[:40]}. "
                f"It must be one of {', '.join(_DISK_FORMATS)}."
            )
        if wanted.container_format != "bare":
            raise BadRequest(
                f"Invalid input for field/attribute container_format. Value: {wanted.container_format[:40]}. "
                "It must be bare."
            )
        allowed = ("available", "in-use") if wanted.force else ("available",)
        if record.status not in allowed:
            raise _refused(record, allowed)
        context, known = request.context, record.document.image_metadata
        image_id = await self._volumes.images.image_new(
            wanted.image_name, project_id=context.project_id, is_admin=context.is_admin, disk_format=wanted.disk_format,
            visibility=wanted.visibility, protected=wanted.protected, min_disk_gib=record.size_gib,
            min_ram_mib=int(known.get("min_ram", "0") or 0),
            properties={key: value for key, value in known.items() if key not in _IMAGE_FIELDS},
        )  # fmt: skip
        work = Work("upload", image_id=image_id, disk_format=wanted.disk_format)
        try:
            await self._store.write(
                sql.volume_status(record.id, before=allowed, after="uploading", work=work, error=_refused(record, allowed))
            )
        except VolumeUnusable:
            await self._volumes.images.image_drop(image_id)
            raise
        await self._volumes.storage.wake(volume_subject(record.id))
        kind = next((one for one in await type_list(self._store) if one.id == record.type_id), None)
        told = {
            "id": record.id, "image_id": image_id, "image_name": wanted.image_name, "status": "uploading",
            "size": record.size_gib, "display_description": record.description, "disk_format": wanted.disk_format,
            "container_format": wanted.container_format, "visibility": wanted.visibility, "protected": wanted.protected,
            "updated_at": timestamp(record.updated_at),
            "volume_type": {"id": record.type_id, "name": kind.name if kind else ""},
        }  # fmt: skip
        return json_answer({"os-volume_upload_image": told}, 202)

    async def _revert(self, request: Request, record: VolumeRecord, wanted: schemas.Revert) -> None:
        snapshots = await snapshot_sql.snapshots_of_volume(self._store, record.id)
        newest = snapshots[-1] if snapshots else None
        if newest is None or newest.id != wanted.snapshot_id or newest.status != "available":
            raise BadRequest(
                f"Invalid input for field/attribute snapshot_id. Value: {wanted.snapshot_id}. "
                "A volume is reverted to its latest snapshot, which must be available."
            )
        if newest.size_gib != record.size_gib:
            raise BadRequest(f"Volume {record.id} was extended since snapshot {newest.id}: it cannot be reverted to it.")
        await self._store.write(
            sql.volume_status(
                record.id, before=("available",), after="reverting", work=Work("revert", snapshot_id=newest.id),
                error=_refused(record, ("available",)),
            )
        )  # fmt: skip
        await self._volumes.storage.wake(volume_subject(record.id))

    # --- attachments, as those do who know no attachments API -----------------------------------------------------------

    async def _reserve(self, request: Request, record: VolumeRecord, wanted: None) -> None:
        await self._volumes.attachment_new(str(uuid.uuid4()), record.id, instance_id="")

    async def _unreserve(self, request: Request, record: VolumeRecord, wanted: None) -> None:
        for attachment in await self._of(record, "reserved", "attaching"):
            if not attachment.instance_id:
                await self._volumes.detach(attachment.id)

    async def _attach(self, request: Request, record: VolumeRecord, wanted: schemas.Attach) -> None:
        instance_id, device = wanted.instance_uuid or "", wanted.mountpoint or ""
        if not instance_id and not wanted.host_name:
            raise BadRequest("Invalid input for field/attribute instance_uuid. Value: None. A server or a host is needed.")
        if wanted.mode not in ("rw", "ro"):
            raise BadRequest(f"Invalid input for field/attribute mode. Value: {wanted.mode[:40]}. It must be rw or ro.")
        taken = [one for one in await self._of(record, "reserved", "attaching") if one.instance_id in ("", instance_id)]
        attachment = (
            taken[0]
            if taken
            else await self._volumes.attachment_new(
                str(uuid.uuid4()), record.id, instance_id=instance_id, read_only=wanted.mode == "ro"
            )
        )
        columns: dict[str, Value] = {"instance_id": instance_id, "device": device or attachment.device}
        if wanted.host_name:
            columns["host"] = wanted.host_name
        await self._store.write(*attachment_sql.attachment_update(attachment, **columns))
        await self._volumes.complete(attachment.id)

    async def _detach(self, request: Request, record: VolumeRecord, wanted: schemas.Detach) -> None:
        attachments = await attachment_sql.attachments_of_volume(self._store, record.id)
        if wanted.attachment_id is not None:
            attachments = [one for one in attachments if one.id == wanted.attachment_id]
            if not attachments:
                raise NotFound(kind="Volume attachment", id=wanted.attachment_id)
        elif len(attachments) > 1:
            raise BadRequest(f"Volume {record.id} has more than one attachment: name one by attachment_id.")
        for attachment in attachments:
            await self._volumes.detach(attachment.id)

    async def _begin_detaching(self, request: Request, record: VolumeRecord, wanted: None) -> None:
        attached = await self._of(record, "attached")
        if not attached:
            raise _refused(record, ("in-use",))
        for attachment in attached[:1]:
            await self._volumes.mark_detaching(attachment.id, detaching=True)

    async def _roll_detaching(self, request: Request, record: VolumeRecord, wanted: None) -> None:
        for attachment in await self._of(record, "detaching"):
            await self._volumes.mark_detaching(attachment.id, detaching=False)

    async def _initialize_connection(self, request: Request, record: VolumeRecord, wanted: schemas.Connect) -> Answer:
        connector = schemas.convert(wanted.connector, schemas.Connector)
        taken = await self._of(record, "reserved", "attaching", "attached")
        if not taken:
            raise _refused(record, ("reserved", "attaching", "in-use"))
        attachment = taken[0]
        connection = await self._volumes.connect(
            attachment.id, host=connector.host or "unknown", host_ip=connector.ip, device=attachment.device
        )
        return json_answer({"connection_info": connection_info(request, attachment, connection)}, 200)

    async def _terminate_connection(self, request: Request, record: VolumeRecord, wanted: schemas.Connect) -> None:
        """The data is no longer served to those who are not attached; the attachment's end is `os-detach`."""
        for attachment in await self._of(record, "attaching", "detaching"):
            await self._store.write(*attachment_sql.attachment_update(attachment, host=""))
        await self._volumes.stop_serving(record.id)

    async def _of(self, record: VolumeRecord, *statuses: str) -> list[AttachmentRecord]:
        return [one for one in await attachment_sql.attachments_of_volume(self._store, record.id) if one.status in statuses]

    # --- administrators -----------------------------------------------------------------------------------------------

    async def _reset_status(self, request: Request, record: VolumeRecord, wanted: schemas.ResetStatus) -> None:
        if wanted.status is None and wanted.attach_status is None and wanted.migration_status is None:
            raise BadRequest("Invalid input for field/attribute status. Value: None. Must specify 'status' to reset.")
        if wanted.status is not None and wanted.status not in _STATUSES:
            raise BadRequest(f"Invalid input for field/attribute status. Value: {wanted.status[:60]}. It is no status.")
        if wanted.attach_status not in (None, "attached", "detached"):
            raise BadRequest(
                f"Invalid input for field/attribute attach_status. Value: {str(wanted.attach_status)[:60]}. "
                "It must be attached or detached."
            )
        if wanted.attach_status == "detached":
            for attachment in await attachment_sql.attachments_of_volume(self._store, record.id):
                await self._volumes.detach(attachment.id)
        if wanted.status is not None:
            await self._store.write(
                sql.volume_columns(record.id, status=wanted.status, status_before="available", work=None)
            )
            await self._volumes.storage.wake(volume_subject(record.id))  # what it works at is not wanted any more

    async def _force_delete(self, request: Request, record: VolumeRecord, wanted: None) -> None:
        """Whatever its status, attachments too; a volume with snapshots stays."""
        if await sql.volume_has_snapshots(self._store, record.id):
            raise VolumeUnusable(volume_id=record.id, reason="it has snapshots.")
        for attachment in await attachment_sql.attachments_of_volume(self._store, record.id):
            await self._volumes.detach(attachment.id)
        await self._volumes.delete_begin(record, tuple({*_STATUSES, *FAILED}))

    # --- flags, image metadata, type ----------------------------------------------------------------------------------

    async def _read_only(self, request: Request, record: VolumeRecord, wanted: schemas.Readonly) -> None:
        if record.status != "available":
            raise _refused(record, ("available",))
        refused = _refused(record, ("available",))
        await self._store.write(
            sql.volume_columns_if(record.id, ("available",), refused, read_only=int(wanted.readonly))
        )

    async def _bootable(self, request: Request, record: VolumeRecord, wanted: schemas.Bootable) -> Answer:
        await self._store.write(sql.volume_columns(record.id, bootable=int(wanted.bootable)))
        return empty_answer(200)

    async def _set_image_metadata(self, request: Request, record: VolumeRecord, wanted: schemas.SetImageMetadata) -> Answer:
        after = await self._change_image_metadata(request, lambda before: merged(before, wanted.metadata))
        return json_answer({"metadata": after})

    async def _unset_image_metadata(
        self, request: Request, record: VolumeRecord, wanted: schemas.UnsetImageMetadata
    ) -> Answer:
        def without(before: dict[str, str]) -> dict[str, str]:
            if wanted.key not in before:
                raise NotFound(f"Metadata item {wanted.key} could not be found.")
            return {key: value for key, value in before.items() if key != wanted.key}

        await self._change_image_metadata(request, without)
        return empty_answer(200)

    async def _show_image_metadata(self, request: Request, record: VolumeRecord, wanted: None) -> Answer:
        return json_answer({"metadata": record.document.image_metadata})

    async def _change_image_metadata(
        self, request: Request, change: Callable[[dict[str, str]], dict[str, str]]
    ) -> dict[str, str]:
        async def changed(record: VolumeRecord) -> None:
            document = msgspec.structs.replace(record.document, image_metadata=change(record.document.image_metadata))
            await self._store.write(sql.volume_document(record, document, WriteConflict()))

        return (await edit(lambda: own_volume(self._volumes, request), changed)).document.image_metadata

    async def _retype(self, request: Request, record: VolumeRecord, wanted: schemas.Retype) -> None:
        """Types differ in what is promised, not in where the data is: nothing is moved."""
        if record.status != "available":
            raise _refused(record, ("available",))
        try:
            kind = await type_find(
                self._store, wanted.new_type, request.context.project_id, is_admin=request.context.is_admin
            )
        except NotFound as error:
            raise BadRequest(
                f"Invalid input for field/attribute new_type. Value: {wanted.new_type}. There is no such volume type."
            ) from error
        await self._store.write(
            sql.volume_columns_if(
                record.id, ("available",), _refused(record, ("available",)),
                type_id=kind.id, multiattach=int(kind.multiattach),
            )
        )  # fmt: skip


def _refused(record: VolumeRecord, allowed: tuple[str, ...]) -> VolumeUnusable:
    return VolumeUnusable(
        volume_id=record.id, reason=f"its status must be {' or '.join(allowed)}, but it is {record.status}."
    )
