"""Changes of a server that need no operation: update, metadata, tags; and its deletion.

Each reads the instance, changes its spec and writes it back if nobody else did meanwhile, else tries again.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import UNSET

from instar.api.body import MetadataKey, Tag, convert
from instar.api.resource import ApiRoute, Compute, read_body, service_url
from instar.api.servers.bodies import TAGS_MAX, MetadataBody, MetaItemBody, TagsBody, UpdateServer
from instar.api.servers.checks import check_address, check_metadata_count
from instar.api.servers.listing import scene_of, visible_instance
from instar.api.servers.naming import check_hostname
from instar.api.servers.view import UPDATE, server_view
from instar.errors import BadRequest, Conflict, Locked, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.model.instance import Instance, InstanceSpec
from instar.store.contract import WriteConflict
from instar.store.instance_queries import instance_update_spec
from instar.store.quotas import quota_limits

ATTEMPTS_MAX = 10
ChangeSpec = Callable[[InstanceSpec], InstanceSpec]


class MetaKey(msgspec.Struct, frozen=True):
    """A metadata key in a path, to be checked like one in a body."""

    key: MetadataKey


class TagName(msgspec.Struct, frozen=True):
    tag: Tag


async def change_spec(
    compute: Compute, request: Request, change: ChangeSpec, *, name: str | None = None, hostname: str | None = None
) -> Instance:
    """The server of the request with its spec changed. Raises NotFound, Locked, Conflict after too many others."""
    for _ in range(ATTEMPTS_MAX):
        instance = await visible_instance(compute, request.context, request.params["server_id"])
        if instance.locked_by and not request.context.is_admin:
            raise Locked(id=instance.id)
        spec = change(instance.spec)
        try:
            await compute.store.write(instance_update_spec(instance, spec, name=name, hostname=hostname))
        except WriteConflict:
            continue
        return msgspec.structs.replace(
            instance, spec=spec, name=name or instance.name, hostname=hostname or instance.hostname
        )
    raise Conflict(f"Instance {request.params['server_id']} is being changed by others.")


class ServerChanges:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        name = "os_compute_api:servers:"
        return [
            ApiRoute("PUT", "/servers/{server_id}", name + "update", self.update),
            ApiRoute("DELETE", "/servers/{server_id}", name + "delete", self.delete),
        ]

    async def update(self, request: Request) -> Answer:
        server = (await read_body(request, UpdateServer)).server
        changes: dict[str, str | None] = {}
        if server.access_ip_v4 is not UNSET:
            changes["access_ip_v4"] = check_address("accessIPv4", server.access_ip_v4, 4)
        if server.access_ip_v6 is not UNSET:
            changes["access_ip_v6"] = check_address("accessIPv6", server.access_ip_v6, 6)
        if server.disk_config is not UNSET:
            changes["disk_config"] = server.disk_config
        if server.description is not UNSET:
            changes["description"] = server.description
        instance = await change_spec(
            self._compute,
            request,
            lambda spec: msgspec.structs.replace(spec, **changes),
            name=None if server.name is UNSET else server.name,
            hostname=None if server.hostname is UNSET else check_hostname(server.hostname, request.microversion),
        )
        scene = await scene_of(self._compute, request)
        return json_answer({"server": server_view(instance, scene, is_admin=request.context.is_admin, kind=UPDATE)})

    async def delete(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        await self._compute.lifecycle.delete(request.context, instance)
        return empty_answer(204)


class ServerMetadata:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        name, path = "os_compute_api:server-metadata:", "/servers/{server_id}/metadata"
        return [
            ApiRoute("GET", path, name + "index", self.index),
            ApiRoute("POST", path, name + "create", self.merge),
            ApiRoute("PUT", path, name + "update_all", self.replace),
            ApiRoute("GET", path + "/{key}", name + "show", self.show),
            ApiRoute("PUT", path + "/{key}", name + "update", self.put),
            ApiRoute("DELETE", path + "/{key}", name + "delete", self.delete),
        ]

    async def index(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        return json_answer({"metadata": instance.spec.metadata})

    async def show(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        key = request.params["key"]
        if key not in instance.spec.metadata:
            raise NotFound("Metadata item was not found")
        return json_answer({"meta": {key: instance.spec.metadata[key]}})

    async def merge(self, request: Request) -> Answer:
        given = (await read_body(request, MetadataBody)).metadata
        return json_answer({"metadata": await self._change(request, lambda was: was | given)})

    async def replace(self, request: Request) -> Answer:
        given = (await read_body(request, MetadataBody)).metadata
        return json_answer({"metadata": await self._change(request, lambda _: given)})

    async def put(self, request: Request) -> Answer:
        meta = (await read_body(request, MetaItemBody)).meta
        key = convert({"key": request.params["key"]}, MetaKey, 1).key
        if len(meta) != 1:
            raise BadRequest("Invalid input: meta: exactly one item is needed.")
        if key not in meta:
            raise BadRequest("Request body and URI mismatch")
        await self._change(request, lambda was: was | meta)
        return json_answer({"meta": meta})

    async def delete(self, request: Request) -> Answer:
        key = request.params["key"]

        def without(was: dict[str, str]) -> dict[str, str]:
            if key not in was:
                raise NotFound("Metadata item was not found")
            return {name: value for name, value in was.items() if name != key}

        await self._change(request, without)
        return empty_answer(204)

    async def _change(self, request: Request, change: Callable[[dict[str, str]], dict[str, str]]) -> dict[str, str]:
        project_id = request.context.project_id
        limits = await quota_limits(self._compute.store, self._compute.settings.quota, project_id)

        def changed(spec: InstanceSpec) -> InstanceSpec:
            metadata = change(spec.metadata)
            check_metadata_count(len(metadata), limits)
            return msgspec.structs.replace(spec, metadata=metadata)

        return (await change_spec(self._compute, request, changed)).spec.metadata


class ServerTags:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        name, path = "os_compute_api:os-server-tags:", "/servers/{server_id}/tags"
        return [
            ApiRoute("GET", path, name + "index", self.index, since=26),
            ApiRoute("PUT", path, name + "update_all", self.replace, since=26),
            ApiRoute("DELETE", path, name + "delete_all", self.clear, since=26),
            ApiRoute("GET", path + "/{tag}", name + "show", self.show, since=26),
            ApiRoute("PUT", path + "/{tag}", name + "update", self.put, since=26),
            ApiRoute("DELETE", path + "/{tag}", name + "delete", self.delete, since=26),
        ]

    async def index(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        return json_answer({"tags": instance.spec.tags})

    async def show(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        self._expect(instance.spec, request.params["tag"], instance.id)
        return empty_answer(204)

    async def replace(self, request: Request) -> Answer:
        tags = tuple(sorted(set((await read_body(request, TagsBody)).tags)))
        await change_spec(self._compute, request, lambda spec: msgspec.structs.replace(spec, tags=tags))
        return json_answer({"tags": tags})

    async def clear(self, request: Request) -> Answer:
        await change_spec(self._compute, request, lambda spec: msgspec.structs.replace(spec, tags=()))
        return empty_answer(204)

    async def put(self, request: Request) -> Answer:
        tag = convert({"tag": request.params["tag"]}, TagName, 1).tag
        known = False

        def added(spec: InstanceSpec) -> InstanceSpec:
            nonlocal known
            known = tag in spec.tags
            if not known and len(spec.tags) >= TAGS_MAX:
                raise BadRequest(f"The number of tags exceeded the per-server limit {TAGS_MAX}")
            return spec if known else msgspec.structs.replace(spec, tags=(*spec.tags, tag))

        await change_spec(self._compute, request, added)
        if known:
            return empty_answer(204)
        server_id = request.params["server_id"]
        location = f"{service_url(request)}/servers/{server_id}/tags/{tag}"
        return empty_answer(201, [(b"location", location.encode("ascii", "backslashreplace"))])

    async def delete(self, request: Request) -> Answer:
        tag = request.params["tag"]

        def without(spec: InstanceSpec) -> InstanceSpec:
            self._expect(spec, tag, request.params["server_id"])
            return msgspec.structs.replace(spec, tags=tuple(one for one in spec.tags if one != tag))

        await change_spec(self._compute, request, without)
        return empty_answer(204)

    @staticmethod
    def _expect(spec: InstanceSpec, tag: str, server_id: str) -> None:
        if tag not in spec.tags:
            raise NotFound(f"Server {server_id} has no tag '{tag[:80]}'")
