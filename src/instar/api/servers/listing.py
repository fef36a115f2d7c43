"""`GET /servers`, `/servers/detail` and `/servers/{id}`: one SELECT and one encode, whatever the number of servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from instar.api.resource import ApiRoute, Compute, add_next, page_of
from instar.api.servers.filters import Residual, Wanted, read_query
from instar.api.servers.view import IN_LIST, Scene, server_brief, server_view
from instar.errors import BadRequest, NotFound
from instar.http.answer import Answer, json_answer
from instar.http.body import encode
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.model.instance import Instance, instance_from_row
from instar.store.contract import Row
from instar.store.instance_queries import instance_list, instance_row, instance_sort_values

PART_SIZE = 1000  # records read at once where a filter must look into them


async def visible_instance(compute: Compute, context: RequestContext, instance_id: str) -> Instance:
    """The instance, if it exists and this caller may know of it. Raises NotFound."""
    row = await instance_row(compute.store, instance_id)
    if row is None or row["deleted"] or (row["project_id"] != context.project_id and not context.is_admin):
        raise NotFound(f"Instance {instance_id[:80]} could not be found.")
    return _instance(row)


async def scene_of(compute: Compute, request: Request) -> Scene:
    """What views need to know. Only admins see anything of hosts."""
    hosts = await compute.hosts.seen() if request.context.is_admin else {}
    return Scene(request.base_url, request.microversion, hosts, compute.hosts.zone_of)


class ServerList:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        name = "os_compute_api:servers:"
        return [
            ApiRoute("GET", "/servers", name + "index", self.index),
            ApiRoute("GET", "/servers/detail", name + "detail", self.detail),
            ApiRoute("GET", "/servers/{server_id}", name + "show", self.show),
        ]

    async def show(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        scene = await scene_of(self._compute, request)
        return json_answer({"server": server_view(instance, scene, is_admin=request.context.is_admin)})

    async def index(self, request: Request) -> Answer:
        rows, marker = await self._page(request)
        base = request.base_url
        found: dict[str, Any] = {"servers": [server_brief(row["id"], row["name"], base) for row in rows]}
        return json_answer(add_next(found, "servers", request, marker))

    async def detail(self, request: Request) -> Answer:
        rows, marker = await self._page(request)
        scene, is_admin = await scene_of(self._compute, request), request.context.is_admin
        # Each server is encoded as soon as it is decoded: thousands of dicts at once would set off the garbage
        # collector in the middle of the list, which takes longer than the list.
        servers = [msgspec.Raw(encode(server_view(_instance(row), scene, is_admin=is_admin, kind=IN_LIST))) for row in rows]
        found: dict[str, Any] = {"servers": servers}
        return json_answer(add_next(found, "servers", request, marker))

    async def _page(self, request: Request) -> tuple[Sequence[Row], str | None]:
        """The rows of a page, and the marker of the next one where the page is full."""
        wanted = read_query(request)
        page = page_of(request, self._compute)
        if page.marker is not None:
            scope = wanted.query.project_id
            after = await instance_sort_values(self._compute.store, page.marker, wanted.query.order, scope)
            if after is None:
                raise BadRequest(f"marker [{page.marker}] not found")
            wanted = wanted._replace(query=msgspec.structs.replace(wanted.query, after=after))
        found = await self._matching(wanted, page.limit)
        return found, found[-1]["id"] if len(found) == page.limit else None

    async def _matching(self, wanted: Wanted, limit: int) -> Sequence[Row]:
        """Up to `limit` rows. Where residual filters drop some, the next part is read until the page is full."""
        query = msgspec.structs.replace(wanted.query, limit=limit)
        found: list[Row] = []
        while True:  # ends: each part begins after the last one
            rows = await instance_list(self._compute.store, query)
            if not wanted.residual:
                return rows
            found += [row for row in rows if _passes(wanted.residual, _instance(row))]
            if len(rows) < query.limit or len(found) >= limit:
                return found[:limit]
            last = rows[-1]["id"]
            after = await instance_sort_values(self._compute.store, last, query.order, None)
            query = msgspec.structs.replace(query, after=after, limit=PART_SIZE)


def _instance(row: Row) -> Instance:
    return instance_from_row(row)  # type: ignore[arg-type]


def _passes(residual: tuple[Residual, ...], instance: Instance) -> bool:
    return all(test(instance) for test in residual)
