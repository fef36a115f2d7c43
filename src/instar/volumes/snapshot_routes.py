"""Snapshots in the Block Storage API."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

import msgspec

from instar.errors import BadRequest
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.policy import Policy
from instar.http.request import Request
from instar.http.routing import Route
from instar.store import volume_snapshots as snapshot_sql
from instar.store.contract import WriteConflict
from instar.store.volume_listing import SNAPSHOT_KEYS, snapshot_rows
from instar.store.volume_records import SnapshotRecord, snapshot_from_row
from instar.volumes import schemas
from instar.volumes.listing import list_query, page, records_of
from instar.volumes.metadata_routes import Change, metadata_routes
from instar.volumes.resource import edit, own_snapshot, own_volume
from instar.volumes.service import Volumes
from instar.volumes.storage import snapshot_subject
from instar.volumes.views import snapshot_view

_STATUSES = ("creating", "available", "deleting", "error", "error_deleting")


class SnapshotRoutes:
    def __init__(self, volumes: Volumes, policy: Policy, limit_max: int) -> None:
        self._volumes = volumes
        self._store = volumes.store
        self._policy = policy
        self._limit_max = limit_max

    def routes(self) -> list[Route]:
        one = "/snapshots/{snapshot_id}"
        return [
            Route("GET", "/snapshots", "volume:snapshots:list", self.snapshot_list),
            Route("GET", "/snapshots/detail", "volume:snapshots:list", self.snapshot_detail),
            Route("POST", "/snapshots", "volume:snapshots:create", self.snapshot_create),
            Route("GET", one, "volume:snapshots:show", self.snapshot_show),
            Route("PUT", one, "volume:snapshots:update", self.snapshot_update),
            Route("DELETE", one, "volume:snapshots:delete", self.snapshot_delete),
            Route("POST", f"{one}/action", "volume:snapshots:action", self.action),
            *metadata_routes(one, "volume:snapshots", self._fetch, self._set_metadata),
        ]

    async def snapshot_list(self, request: Request) -> Answer:
        return await self._list(request, detail=False)

    async def snapshot_detail(self, request: Request) -> Answer:
        return await self._list(request, detail=True)

    async def _list(self, request: Request, *, detail: bool) -> Answer:
        query = list_query(request, SNAPSHOT_KEYS, self._limit_max)
        records = await records_of(request, query, partial(snapshot_rows, self._store), snapshot_from_row)
        shown = [snapshot_view(request, one, detail=detail) for one in records]
        return json_answer(page(request, "snapshots", query, shown))

    async def snapshot_create(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.SnapshotBody)).snapshot
        volume = await own_volume(self._volumes, request, wanted.volume_id)
        record = await self._volumes.snapshot_new(
            str(uuid.uuid4()), volume, project_id=volume.project_id, user_id=request.context.user_id, name=wanted.name,
            description=wanted.description, metadata=wanted.metadata, force=wanted.force,
        )  # fmt: skip
        return json_answer({"snapshot": snapshot_view(request, record, detail=False)}, 202)

    async def snapshot_show(self, request: Request) -> Answer:
        return json_answer({"snapshot": snapshot_view(request, await self._fetch(request))})

    async def snapshot_update(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.SnapshotUpdateBody)).snapshot
        record = await self._fetch(request)
        if columns := wanted.columns():
            await self._store.write(snapshot_sql.snapshot_columns(record.id, **columns))
        return json_answer({"snapshot": snapshot_view(request, await self._fetch(request), detail=False)})

    async def snapshot_delete(self, request: Request) -> Answer:
        await self._volumes.snapshot_delete_begin(await self._fetch(request), ("available", "error", "error_deleting"))
        return empty_answer(202)

    async def action(self, request: Request) -> Answer:
        """`os-reset_status` and `os-force_delete`, both for administrators."""
        self._policy.require(request.context, "volume:snapshots:admin")
        body = await schemas.read(request, dict[str, Any])
        record = await self._fetch(request)
        match list(body):
            case ["os-reset_status"]:
                status = schemas.convert(body["os-reset_status"], schemas.ResetStatus).status
                if status not in _STATUSES:
                    shown = str(status)[:60]
                    raise BadRequest(f"Invalid input for field/attribute status. Value: {shown}. It is no status.")
                await self._store.write(snapshot_sql.snapshot_columns(record.id, status=status, work=None))
                await self._volumes.storage.wake(snapshot_subject(record.id))  # what it works at is not wanted any more
            case ["os-force_delete"]:
                await self._volumes.snapshot_delete_begin(record, _STATUSES)
            case _:
                raise BadRequest(f"There is no such action: {', '.join(body)[:100]}")
        return empty_answer(202)

    async def _fetch(self, request: Request) -> SnapshotRecord:
        return await own_snapshot(self._volumes, request)

    async def _set_metadata(self, request: Request, change: Change) -> dict[str, str]:
        async def changed(record: SnapshotRecord) -> None:
            document = msgspec.structs.replace(record.document, metadata=change(record.document.metadata))
            await self._store.write(snapshot_sql.snapshot_document(record, document, WriteConflict()))

        return (await edit(lambda: self._fetch(request), changed)).document.metadata
