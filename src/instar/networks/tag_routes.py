"""Tags of networks, subnets, ports and security groups in the Network API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from instar.clock import now_us
from instar.errors import NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.body import convert
from instar.http.request import Request
from instar.http.routing import Route
from instar.networks import schemas
from instar.networks.failures import (
    NetworkNotFound,
    PortNotFound,
    SecurityGroupNotFound,
    SubnetNotFound,
    TagNotFound,
)
from instar.networks.local import LocalNetworks
from instar.networks.ownership import decided_again, require_owner, visible
from instar.store.network_records import NETWORKS, PORTS, SECURITY_GROUPS, SUBNETS, Table, record_fetch


class _Tagged(NamedTuple):
    table: Table[Any]
    error: type[NotFound]


_TAGGED = {
    "networks": _Tagged(NETWORKS, NetworkNotFound),
    "subnets": _Tagged(SUBNETS, SubnetNotFound),
    "ports": _Tagged(PORTS, PortNotFound),
    "security-groups": _Tagged(SECURITY_GROUPS, SecurityGroupNotFound),
}
_Change = Callable[[Sequence[str]], Sequence[str]]


class TagRoutes:
    def __init__(self, networks: LocalNetworks) -> None:
        self._store = networks.store

    def routes(self) -> list[Route]:
        routes = []
        for collection, tagged in _TAGGED.items():
            handlers = _Handlers(self, tagged)
            tags = f"/v2.0/{collection}/{{id}}/tags"
            one = f"{tags}/{{tag}}"
            routes += [
                Route("GET", tags, "network:tags:list", handlers.tag_list),
                Route("PUT", tags, "network:tags:update", handlers.tag_replace),
                Route("DELETE", tags, "network:tags:update", handlers.tag_clear),
                Route("GET", one, "network:tags:list", handlers.tag_check),
                Route("PUT", one, "network:tags:update", handlers.tag_add),
                Route("DELETE", one, "network:tags:update", handlers.tag_remove),
            ]
        return routes

    async def tags(self, request: Request, tagged: _Tagged) -> Sequence[str]:
        record = await visible(self._store, tagged.table, request.params["id"], request.context, tagged.error)
        tags: Sequence[str] = record.tags
        return tags

    async def change(self, request: Request, tagged: _Tagged, change: _Change) -> Sequence[str]:
        async def attempt() -> Sequence[str]:
            record = await visible(self._store, tagged.table, request.params["id"], request.context, tagged.error)
            owners = [record.project_id]
            if hasattr(record, "network_id"):
                network = await record_fetch(self._store, NETWORKS, record.network_id)
                owners += [network.project_id] if network is not None else []
            require_owner(request.context, "update_tags", *owners)
            tags = tuple(dict.fromkeys(change(record.tags)))
            convert(list(tags), schemas.Tags)
            if tags != record.tags:
                await self._store.write(tagged.table.update(replace(record, tags=tags, updated_at=now_us())))
            return tags

        return await decided_again(attempt, "Resource", request.params["id"])


class _Handlers:
    """The routes of one collection."""

    def __init__(self, routes: TagRoutes, tagged: _Tagged) -> None:
        self._routes = routes
        self._tagged = tagged

    async def tag_list(self, request: Request) -> Answer:
        return json_answer({"tags": await self._routes.tags(request, self._tagged)})

    async def tag_check(self, request: Request) -> Answer:
        if request.params["tag"] not in await self._routes.tags(request, self._tagged):
            raise TagNotFound(id=request.params["tag"])
        return empty_answer()

    async def tag_replace(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.TagsBody)).tags
        return json_answer({"tags": await self._routes.change(request, self._tagged, lambda tags: wanted)})

    async def tag_clear(self, request: Request) -> Answer:
        await self._routes.change(request, self._tagged, lambda tags: ())
        return empty_answer()

    async def tag_add(self, request: Request) -> Answer:
        tag = request.params["tag"]
        await self._routes.change(request, self._tagged, lambda tags: (*tags, tag))
        return empty_answer(201)

    async def tag_remove(self, request: Request) -> Answer:
        tag = request.params["tag"]

        def without(tags: Sequence[str]) -> Sequence[str]:
            if tag not in tags:
                raise TagNotFound(id=tag)
            return [one for one in tags if one != tag]

        await self._routes.change(request, self._tagged, without)
        return empty_answer()
