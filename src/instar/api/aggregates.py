"""Host aggregates: groups of hosts that admins make, with metadata for the scheduler and perhaps a zone."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from instar.api.body import HostName, MetadataKey, MetadataValue, Name, Uuid, convert
from instar.api.resource import ApiRoute, Compute, integer, read_body
from instar.api.servers.actions import decode_action
from instar.api.servers.bodies import Record
from instar.clock import iso_us, now_us
from instar.errors import BadRequest, Conflict, ImageUnusable, NotFound, UnknownReference
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.policy import Policy
from instar.http.request import Request
from instar.store.aggregates import (
    Aggregate,
    aggregate_add_host,
    aggregate_create,
    aggregate_delete,
    aggregate_fetch,
    aggregate_list,
    aggregate_remove_host,
    aggregate_update,
)
from instar.store.instance_queries import instance_names_by_host

UUID_SINCE = 41
IMAGES_SINCE = 81
_NAME = "os_compute_api:os-aggregates:"
ZONE_KEY = "availability_zone"  # a zone can also be set as an item of metadata
Zone = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^:]*\Z")]


class AggregateFields(Record, frozen=True):
    name: Name | UnsetType = UNSET
    availability_zone: Zone | UnsetType | None = UNSET


class AggregateBody(Record, frozen=True):
    aggregate: AggregateFields


class HostBody(Record, frozen=True):
    host: HostName


class SetMetadata(Record, frozen=True):
    metadata: dict[MetadataKey, MetadataValue | None]


class CachedImage(Record, frozen=True):
    id: Uuid


class CacheImages(Record, frozen=True):
    cache: Annotated[list[CachedImage], Meta(min_length=1)]


class Aggregates:
    def __init__(self, compute: Compute, policy: Policy) -> None:
        self._compute = compute
        self._store = compute.store
        self._policy = policy

    def routes(self) -> list[ApiRoute]:
        path = "/os-aggregates"
        return [
            ApiRoute("GET", path, _NAME + "index", self.index),
            ApiRoute("POST", path, _NAME + "create", self.create),
            ApiRoute("GET", path + "/{id}", _NAME + "show", self.show),
            ApiRoute("PUT", path + "/{id}", _NAME + "update", self.update),
            ApiRoute("DELETE", path + "/{id}", _NAME + "delete", self.delete),
            ApiRoute("POST", path + "/{id}/action", _NAME + "action", self.act),
            ApiRoute("POST", path + "/{id}/images", "compute:aggregates:images", self.cache_images, since=IMAGES_SINCE),
        ]

    async def index(self, request: Request) -> Answer:
        found = [_view(one, request.microversion) for one in await aggregate_list(self._store)]
        return json_answer({"aggregates": found})

    async def create(self, request: Request) -> Answer:
        given = (await read_body(request, AggregateBody)).aggregate
        if isinstance(given.name, UnsetType):
            raise BadRequest("Invalid input: aggregate: 'name' is a required property")
        zone = None if isinstance(given.availability_zone, UnsetType) else given.availability_zone
        made = await aggregate_create(self._store, uuid=str(uuid.uuid4()), name=given.name, zone=zone, now_us=now_us())
        view = _view(made, request.microversion)
        return json_answer({"aggregate": {name: view[name] for name in view if name not in ("hosts", "metadata")}})

    async def show(self, request: Request) -> Answer:
        return self._answer(await self._fetch(request), request)

    async def update(self, request: Request) -> Answer:
        given = (await read_body(request, AggregateBody)).aggregate
        aggregate = await self._fetch(request)
        if given.name is UNSET and given.availability_zone is UNSET:
            raise BadRequest("Invalid input: aggregate: does not have enough properties")
        changed = msgspec.structs.replace(
            aggregate,
            name=aggregate.name if isinstance(given.name, UnsetType) else given.name,
            availability_zone=aggregate.availability_zone
            if isinstance(given.availability_zone, UnsetType)
            else given.availability_zone,
        )
        return await self._write(aggregate, changed, request)

    async def _write(self, was: Aggregate, changed: Aggregate, request: Request) -> Answer:
        if changed.availability_zone != was.availability_zone:
            await self._refuse_moving_servers(was.hosts)
        await self._store.write(*aggregate_update(changed, now_us()))
        await self._compute.hosts.changed()
        return self._answer(await self._fetch(request), request)

    async def _refuse_moving_servers(self, hosts: tuple[str, ...]) -> None:
        """Servers do not move between zones because somebody renames one. Raises Conflict."""
        used = await instance_names_by_host(self._store)
        for host in hosts:
            if used.get(host):
                raise Conflict(f"Host {host} has servers: its availability zone cannot be changed.")

    async def delete(self, request: Request) -> Answer:
        aggregate = await self._fetch(request)
        await self._store.write(aggregate_delete(aggregate.id))
        return empty_answer(200)

    async def act(self, request: Request) -> Answer:
        body = decode_action(await request.body())
        if len(body) != 1:
            raise BadRequest("Malformed request body: it must name exactly one action.")
        key, value = next(iter(body.items()))
        version: int = request.microversion
        if key not in ("add_host", "remove_host", "set_metadata"):
            raise BadRequest(f"There is no such action: {key[:80]}")
        self._policy.require(request.context, _NAME + key)
        if key == "set_metadata":
            return await self._set_metadata(request, convert(value, SetMetadata, version).metadata)
        host = convert(value, HostBody, version).host
        aggregate = await self._fetch(request)
        if key == "add_host":
            if aggregate.availability_zone and host not in aggregate.hosts:
                await self._refuse_moving_servers((host,))
            await self._store.write(*aggregate_add_host(aggregate.id, host, now_us()))
        else:
            if aggregate.availability_zone:
                await self._refuse_moving_servers((host,))
            await self._store.write(*aggregate_remove_host(aggregate.id, host, now_us()))
        await self._compute.hosts.changed()
        return self._answer(await self._fetch(request), request)

    async def cache_images(self, request: Request) -> Answer:
        """Every host of the aggregate that is up fetches these images, in the background."""
        asked = [str(uuid.UUID(image.id)) for image in (await read_body(request, CacheImages)).cache]
        if len(set(asked)) != len(asked):
            raise BadRequest("Duplicate images in request")
        aggregate = await self._fetch(request)
        context = request.context
        for image_id in asked:
            try:
                image = await self._compute.images.image_fetch(
                    image_id, project_id=context.project_id, is_admin=context.is_admin
                )
            except NotFound as error:
                raise UnknownReference(kind="Image", name=image_id) from error
            if image.status != "active":
                raise ImageUnusable(f"Image {image_id} is not active.")
        seen = await self._compute.hosts.seen()
        up = [host for host in aggregate.hosts if host in seen and seen[host].is_up]
        self._compute.lifecycle.prefetch.ask(asked, up)
        return empty_answer(202)

    async def _set_metadata(self, request: Request, given: dict[str, str | None]) -> Answer:
        aggregate = await self._fetch(request)
        zone = given.get(ZONE_KEY, aggregate.availability_zone)
        metadata = dict(aggregate.metadata)
        for name, value in given.items():
            if value is None:
                metadata.pop(name, None)
            elif name != ZONE_KEY:
                metadata[name] = value
        changed = msgspec.structs.replace(aggregate, metadata=metadata, availability_zone=zone)
        return await self._write(aggregate, changed, request)

    async def _fetch(self, request: Request) -> Aggregate:
        text = request.params["id"]
        try:
            number = integer("id", text)
        except BadRequest as error:
            raise NotFound(kind="Aggregate", id=text[:80]) from error
        return await aggregate_fetch(self._store, number)

    def _answer(self, aggregate: Aggregate, request: Request) -> Answer:
        return json_answer({"aggregate": _view(aggregate, request.microversion)})


def _view(aggregate: Aggregate, version: int) -> dict[str, Any]:
    zone = aggregate.availability_zone
    view: dict[str, Any] = {
        "id": aggregate.id,
        "name": aggregate.name,
        "availability_zone": zone,
        "hosts": aggregate.hosts,
        "metadata": aggregate.metadata | ({ZONE_KEY: zone} if zone else {}),
        "created_at": iso_us(aggregate.created_at),
        "updated_at": None if aggregate.updated_at is None else iso_us(aggregate.updated_at),
        "deleted": False,
        "deleted_at": None,
    }
    if version >= UUID_SINCE:
        view["uuid"] = aggregate.uuid
    return view
