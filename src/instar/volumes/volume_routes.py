"""Volumes in the Block Storage API: lists, create, show, change, delete. What is done to one: `action_routes.py`."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

import msgspec

from instar.errors import BadRequest
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.store import volume_attachments as attachment_sql
from instar.store import volume_snapshots as snapshot_sql
from instar.store import volumes as sql
from instar.store.contract import WriteConflict
from instar.store.volume_listing import (
    VOLUME_KEYS,
    ListQuery,
    attachments_of_project,
    volume_rows,
    volume_summary,
)
from instar.store.volume_quotas import type_list
from instar.store.volume_records import AttachmentRecord, VolumeRecord, attachment_from_row, volume_from_row
from instar.volumes import microversion as since
from instar.volumes import schemas
from instar.volumes.creation import ZONE, NewVolume
from instar.volumes.listing import METADATA_SCAN_MAX, flag, list_query, page, records_of
from instar.volumes.metadata_routes import Change, metadata_routes
from instar.volumes.resource import asked_since, edit, own_volume
from instar.volumes.service import FAILED, Volumes
from instar.volumes.storage import snapshot_subject
from instar.volumes.views import volume_brief, volume_view

_DELETABLE = ("available", *FAILED)


class VolumeRoutes:
    def __init__(self, volumes: Volumes, limit_max: int) -> None:
        self._volumes = volumes
        self._store = volumes.store
        self._limit_max = limit_max

    def routes(self) -> list[Route]:
        one = "/volumes/{volume_id}"
        return [
            Route("GET", "/volumes", "volume:volumes:list", self.volume_list),
            Route("GET", "/volumes/detail", "volume:volumes:list", self.volume_detail),
            Route("GET", "/volumes/summary", "volume:volumes:list", self.volume_summary),
            Route("POST", "/volumes", "volume:volumes:create", self.volume_create),
            Route("GET", one, "volume:volumes:show", self.volume_show),
            Route("PUT", one, "volume:volumes:update", self.volume_update),
            Route("DELETE", one, "volume:volumes:delete", self.volume_delete),
            *metadata_routes(one, "volume:volumes", self._fetch, self._set_metadata),
        ]

    # --- lists --------------------------------------------------------------------------------------------------------

    async def volume_list(self, request: Request) -> Answer:
        return await self._list(request, detail=False)

    async def volume_detail(self, request: Request) -> Answer:
        return await self._list(request, detail=True)

    async def _list(self, request: Request, *, detail: bool) -> Answer:
        query = list_query(request, VOLUME_KEYS, self._limit_max)
        records = await records_of(request, query, partial(volume_rows, self._store), volume_from_row)
        if detail:
            types = {one.id: one.name for one in await type_list(self._store)}
            attachments = await attachments_of_project(self._store, query.project_id)
            shown = [
                volume_view(
                    request, one, types.get(one.type_id, ""),
                    [attachment_from_row(row) for row in attachments.get(one.id, [])],
                )
                for one in records
            ]  # fmt: skip
        else:
            shown = [volume_brief(request, one) for one in records]
        body = page(request, "volumes", query, shown)
        counted = request.query_one("with_count")
        if counted is not None and request.microversion >= since.COUNT and flag("with_count", counted):
            everything = await volume_rows(self._store, query._replace(limit=METADATA_SCAN_MAX, marker=None, offset=0))
            body["count"] = len(everything)
        return json_answer(body)

    async def volume_summary(self, request: Request) -> Answer:
        asked_since(request, since.SUMMARY)
        query = list_query(request, VOLUME_KEYS, self._limit_max)
        count, gib = await volume_summary(self._store, query.project_id)
        summary: dict[str, Any] = {"total_count": count, "total_size": gib}
        if request.microversion >= since.SUMMARY_METADATA:
            summary["metadata"] = await self._all_metadata(query.project_id)
        return json_answer({"volume-summary": summary})

    async def _all_metadata(self, project_id: str | None) -> dict[str, list[str]]:
        query = ListQuery(project_id, METADATA_SCAN_MAX)
        found: dict[str, set[str]] = {}
        for row in await volume_rows(self._store, query):
            for key, value in volume_from_row(row).document.metadata.items():
                found.setdefault(key, set()).add(value)
        return {key: sorted(values) for key, values in found.items()}

    # --- one ----------------------------------------------------------------------------------------------------------

    async def volume_create(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.VolumeBody)).volume
        if wanted.backup_id is not None:
            shown = wanted.backup_id[:60]
            raise BadRequest(f"Invalid input for field/attribute backup_id. Value: {shown}. There are no backups.")
        if wanted.multiattach:
            raise BadRequest(
                "Invalid input for field/attribute multiattach. Value: True. "
                "A volume is shared by its type: the extra spec multiattach=<is> True."
            )
        if wanted.availability_zone not in (None, "", ZONE):
            raise BadRequest(f"Availability zone '{wanted.availability_zone}' is invalid.")
        if wanted.size is None and not (wanted.snapshot_id or wanted.source_volid):
            raise BadRequest("Invalid input for field/attribute size. Value: None. None is not an integer.")
        context = request.context
        record = await self._volumes.create_new(
            NewVolume(
                id=str(uuid.uuid4()), project_id=context.project_id, user_id=context.user_id, is_admin=context.is_admin,
                size_gib=wanted.size or 0, name=wanted.name, description=wanted.description,
                image_id=wanted.imageRef or wanted.image_id or None, snapshot_id=wanted.snapshot_id,
                source_volume_id=wanted.source_volid, volume_type=wanted.volume_type or None,
                availability_zone=wanted.availability_zone or None, metadata=wanted.metadata or {},
            )
        )  # fmt: skip
        return json_answer({"volume": await self._view(request, record)}, 202)

    async def volume_show(self, request: Request) -> Answer:
        return json_answer({"volume": await self._view(request, await self._fetch(request))})

    async def volume_update(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.VolumeUpdateBody)).volume
        record = await self._fetch(request)
        if columns := wanted.columns():
            await self._store.write(sql.volume_columns(record.id, **columns))
        if wanted.metadata is not msgspec.UNSET:
            await self._set_metadata(request, lambda _: dict(wanted.metadata or {}))
        return json_answer({"volume": await self._view(request, await self._fetch(request))})

    async def volume_delete(self, request: Request) -> Answer:
        record = await self._fetch(request)
        cascade = request.query_one("cascade")
        if request.query_one("force") is not None and flag("force", request.query_one("force") or "true"):
            raise BadRequest("A volume is deleted by force with the action os-force_delete.")
        if cascade is not None and flag("cascade", cascade or "true"):
            await self._delete_snapshots(record)
        await self._volumes.delete_begin(record, _DELETABLE)
        return empty_answer(202)

    async def _delete_snapshots(self, record: VolumeRecord) -> None:
        for snapshot in await snapshot_sql.snapshots_of_volume(self._store, record.id):
            await self._volumes.snapshot_delete_begin(snapshot, ("available", "error", "error_deleting"))
            await self._volumes.storage.ended(snapshot_subject(snapshot.id))

    async def _fetch(self, request: Request) -> VolumeRecord:
        return await own_volume(self._volumes, request)

    async def _set_metadata(self, request: Request, change: Change) -> dict[str, str]:
        async def changed(record: VolumeRecord) -> None:
            document = msgspec.structs.replace(record.document, metadata=change(record.document.metadata))
            await self._store.write(sql.volume_document(record, document, WriteConflict()))

        return (await edit(lambda: self._fetch(request), changed)).document.metadata

    async def _view(self, request: Request, record: VolumeRecord) -> dict[str, Any]:
        types = {one.id: one.name for one in await type_list(self._store)}
        attachments: list[AttachmentRecord] = await attachment_sql.attachments_of_volume(self._store, record.id)
        return volume_view(request, record, types.get(record.type_id, ""), attachments)
