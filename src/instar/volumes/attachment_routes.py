"""Attachments in the Block Storage API (since 3.27): what a compute service does with a volume."""

from __future__ import annotations

import uuid

from instar.errors import BadRequest, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.model.volume import VolumeConnection
from instar.store import volume_attachments as attachment_sql
from instar.store.volume_listing import ATTACHMENT_KEYS, attachment_rows
from instar.store.volume_records import AttachmentRecord, attachment_from_row
from instar.volumes import microversion as since
from instar.volumes import schemas
from instar.volumes.listing import list_query, page
from instar.volumes.resource import asked_since, own_volume
from instar.volumes.service import Volumes
from instar.volumes.views import attachment_brief, attachment_view


class AttachmentRoutes:
    def __init__(self, volumes: Volumes, limit_max: int) -> None:
        self._volumes = volumes
        self._store = volumes.store
        self._limit_max = limit_max

    def routes(self) -> list[Route]:
        one = "/attachments/{attachment_id}"
        return [
            Route("GET", "/attachments", "volume:attachments:list", self.attachment_list),
            Route("GET", "/attachments/detail", "volume:attachments:list", self.attachment_detail),
            Route("POST", "/attachments", "volume:attachments:create", self.attachment_create),
            Route("GET", one, "volume:attachments:show", self.attachment_show),
            Route("PUT", one, "volume:attachments:update", self.attachment_update),
            Route("DELETE", one, "volume:attachments:delete", self.attachment_delete),
            Route("POST", f"{one}/action", "volume:attachments:update", self.action),
        ]

    async def attachment_list(self, request: Request) -> Answer:
        return await self._list(request, detail=False)

    async def attachment_detail(self, request: Request) -> Answer:
        return await self._list(request, detail=True)

    async def _list(self, request: Request, *, detail: bool) -> Answer:
        asked_since(request, since.ATTACHMENTS)
        query = list_query(request, ATTACHMENT_KEYS, self._limit_max)
        records = [attachment_from_row(row) for row in await attachment_rows(self._store, query)]
        shown = [attachment_view(request, one) if detail else attachment_brief(one) for one in records]
        return json_answer(page(request, "attachments", query, shown))

    async def attachment_create(self, request: Request) -> Answer:
        asked_since(request, since.ATTACHMENTS)
        wanted = (await schemas.read(request, schemas.AttachmentBody)).attachment
        volume = await own_volume(self._volumes, request, wanted.volume_uuid)
        if wanted.mode is not None and request.microversion < since.ATTACH_MODE:
            raise BadRequest("Invalid input: Additional properties are not allowed ('mode' was unexpected).")
        mode = wanted.mode or (wanted.connector.mode if wanted.connector else None) or "rw"
        if mode not in ("rw", "ro"):
            raise BadRequest(f"Invalid input for field/attribute mode. Value: {mode[:40]}. It must be rw or ro.")
        record = await self._volumes.attachment_new(
            str(uuid.uuid4()), volume.id, instance_id=wanted.instance_uuid or "", read_only=mode == "ro"
        )
        return await self._answer(request, record.id, wanted.connector)

    async def attachment_show(self, request: Request) -> Answer:
        return json_answer({"attachment": attachment_view(request, await self._fetch(request))})

    async def attachment_update(self, request: Request) -> Answer:
        record = await self._fetch(request)
        wanted = (await schemas.read(request, schemas.AttachmentUpdateBody)).attachment
        return await self._answer(request, record.id, wanted.connector)

    async def attachment_delete(self, request: Request) -> Answer:
        record = await self._fetch(request)
        await self._volumes.detach(record.id)
        left = await attachment_sql.attachments_of_volume(self._store, record.volume_id)
        return json_answer({"attachments": [attachment_brief(one) for one in left]})

    async def action(self, request: Request) -> Answer:
        asked_since(request, since.COMPLETE)
        record = await self._fetch(request)
        body = await schemas.read(request, dict[str, object])
        if list(body) not in (["os-complete"], ["complete"]):
            raise BadRequest(f"There is no such action: {', '.join(body)[:100]}")
        if record.status == "reserved":
            raise BadRequest(f"Attachment {record.id} has no host yet: give it a connector first.")
        await self._volumes.complete(record.id)
        return empty_answer(204)

    async def _answer(self, request: Request, attachment_id: str, connector: schemas.Connector | None) -> Answer:
        """The attachment, connected where a host says who it is."""
        connection: VolumeConnection | None = None
        if connector is not None:
            if not connector.host:
                raise BadRequest("Invalid input for field/attribute connector. Value: no host. It must name its host.")
            connection = await self._volumes.connect(
                attachment_id, host=connector.host, host_ip=connector.ip, device=connector.mountpoint
            )
        record = await attachment_sql.attachment_fetch(self._store, attachment_id)
        if record is None:
            raise NotFound(kind="Volume attachment", id=attachment_id)
        return json_answer({"attachment": attachment_view(request, record, connection)})

    async def _fetch(self, request: Request) -> AttachmentRecord:
        asked_since(request, since.ATTACHMENTS)
        attachment_id = request.params["attachment_id"]
        record = await attachment_sql.attachment_fetch(self._store, attachment_id)
        if record is None or not (request.context.is_admin or record.project_id == request.context.project_id):
            raise NotFound(kind="Volume attachment", id=attachment_id)
        return record
