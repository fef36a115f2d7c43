"""`GET /servers`, `/servers/detail` and `/servers/{id}`: one SELECT and one encode, whatever the number of servers."""

from __future__ import annotations

import msgspec

from instar.api.resource import ApiRoute, Compute, add_next, page_of
from instar.api.servers.filters import Wanted, read_query
from instar.api.servers.view import Scene, server_brief, server_view, server_views
from instar.errors import BadRequest, NotFound
from instar.http.answer import Answer, json_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.model.instance import Instance, instance_from_row
from instar.store.instance_queries import instance_list, instance_row, instance_sort_values

PART_SIZE = 1000  # records read at once where a filter must look into them


async def visible_instance(compute: Compute, context: RequestContext, instance_id: str) -> Instance:
    """The instance, if it exists and this caller may know of it. Raises NotFound."""
    row = await instance_row(compute.store, instance_id)
    if row is None or row["deleted"] or (row["project_id"] != context.project_id and not context.is_admin):
        raise NotFound(f"Instance {instance_id[:80]} could not be found.")
    return instance_from_row(row)  # type: ignore[arg-type]


async def scene_of(compute: Compute, request: Request) -> Scene:
    """What views need to know. Only admins see anything of hosts."""
    hosts = await compute.hosts.seen() if request.context.is_admin else {}
    return Scene(request.base_url, request.microversion, hosts)


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
        instances, marker = await self._page(request)
        base = request.base_url
        found = {"servers": [server_brief(one.id, one.name, base) for one in instances]}
        return json_answer(add_next(found, "servers", request, marker))

    async def detail(self, request: Request) -> Answer:
        instances, marker = await self._page(request)
        scene = await scene_of(self._compute, request)
        found = {"servers": server_views(instances, scene, is_admin=request.context.is_admin)}
        return json_answer(add_next(found, "servers", request, marker))

    async def _page(self, request: Request) -> tuple[list[Instance], str | None]:
        """The instances of a page, and the marker of the next one where the page is full."""
        wanted = read_query(request)
        page = page_of(request, self._compute)
        if page.marker is not None:
            scope = wanted.query.project_id
            after = await instance_sort_values(self._compute.store, page.marker, wanted.query.order, scope)
            if after is None:
                raise BadRequest(f"marker [{page.marker}] not found")
            wanted = wanted._replace(query=msgspec.structs.replace(wanted.query, after=after))
        found = await self._matching(wanted, page.limit)
        return found, found[-1].id if len(found) == page.limit else None

    async def _matching(self, wanted: Wanted, limit: int) -> list[Instance]:
        """Up to `limit` instances. Where residual filters drop some, the next part is read until the page is full."""
        query = msgspec.structs.replace(wanted.query, limit=limit)
        found: list[Instance] = []
        while True:  # ends: each part begins after the last one
            rows = await instance_list(self._compute.store, query)
            instances = [instance_from_row(row) for row in rows]  # type: ignore[arg-type]
            if not wanted.residual:
                return instances
            found += [one for one in instances if all(test(one) for test in wanted.residual)]
            if len(rows) < query.limit or len(found) >= limit:
                return found[:limit]
            last = instances[-1].id
            after = await instance_sort_values(self._compute.store, last, query.order, None)
            query = msgspec.structs.replace(query, after=after, limit=PART_SIZE)
