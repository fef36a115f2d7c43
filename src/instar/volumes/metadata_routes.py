"""Metadata of a volume or a snapshot: the same routes, the same rules. Called by the routes of both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from instar.errors import BadRequest, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.store.volume_records import SnapshotRecord, VolumeRecord
from instar.volumes import schemas
from instar.volumes.resource import merged

Metadata = dict[str, str]
Fetch = Callable[[Request], Awaitable[VolumeRecord]] | Callable[[Request], Awaitable[SnapshotRecord]]
Change = Callable[[Metadata], Metadata]
Set = Callable[[Request, Change], Awaitable[Metadata]]


def metadata_routes(one: str, policy: str, fetch: Fetch, change: Set) -> list[Route]:
    """`one` is the path of the record; `change` applies a function to its metadata and returns what they are then."""
    routes = _Metadata(fetch, change)
    every, single = f"{one}/metadata", f"{one}/metadata/{{key}}"
    return [
        Route("GET", every, f"{policy}:show", routes.show),
        Route("POST", every, f"{policy}:update", routes.add),
        Route("PUT", every, f"{policy}:update", routes.replace),
        Route("GET", single, f"{policy}:show", routes.show_one),
        Route("PUT", single, f"{policy}:update", routes.set_one),
        Route("DELETE", single, f"{policy}:update", routes.delete_one),
    ]


class _Metadata:
    def __init__(self, fetch: Fetch, change: Set) -> None:
        self._fetch = fetch
        self._change = change

    async def show(self, request: Request) -> Answer:
        return json_answer({"metadata": (await self._fetch(request)).document.metadata})

    async def add(self, request: Request) -> Answer:
        new = (await schemas.read(request, schemas.MetadataBody)).metadata
        return json_answer({"metadata": await self._change(request, lambda before: merged(before, new))})

    async def replace(self, request: Request) -> Answer:
        new = (await schemas.read(request, schemas.MetadataBody)).metadata
        return json_answer({"metadata": await self._change(request, lambda _: new)})

    async def show_one(self, request: Request) -> Answer:
        key, metadata = request.params["key"], (await self._fetch(request)).document.metadata
        if key not in metadata:
            raise _missing(key)
        return json_answer({"meta": {key: metadata[key]}})

    async def set_one(self, request: Request) -> Answer:
        key, meta = request.params["key"], (await schemas.read(request, schemas.MetaBody)).meta
        if list(meta) != [key]:
            shown = str(meta)[:100]
            raise BadRequest(f"Invalid input for field/attribute meta. Value: {shown}. It must have {key!r} alone.")
        await self._change(request, lambda before: merged(before, meta))
        return json_answer({"meta": meta})

    async def delete_one(self, request: Request) -> Answer:
        key = request.params["key"]

        def without(before: Metadata) -> Metadata:
            if key not in before:
                raise _missing(key)
            return {name: value for name, value in before.items() if name != key}

        await self._change(request, without)
        return empty_answer(200)


def _missing(key: str) -> NotFound:
    return NotFound(f"Metadata item {key[:255]} could not be found.")
