"""Volume types in the Block Storage API: everybody looks, administrators change."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from instar.clock import now_us
from instar.errors import BadRequest, Conflict, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.store import volume_quotas as sql
from instar.store.volume_quotas import TypeRecord
from instar.volumes import schemas
from instar.volumes.listing import flag
from instar.volumes.service import Volumes
from instar.volumes.types import DEFAULT_TYPE, type_find, types_visible
from instar.volumes.views import type_view


class TypeRoutes:
    def __init__(self, volumes: Volumes) -> None:
        self._store = volumes.store

    def routes(self) -> list[Route]:
        one = "/types/{type_id}"
        specs, access = f"{one}/extra_specs", f"{one}/os-volume-type-access"
        return [
            Route("GET", "/types", "volume:types:list", self.type_list),
            Route("POST", "/types", "volume:types:create", self.type_create),
            Route("GET", one, "volume:types:show", self.type_show),
            Route("PUT", one, "volume:types:update", self.type_update),
            Route("DELETE", one, "volume:types:delete", self.type_delete),
            Route("GET", f"{one}/encryption", "volume:types:show", self.encryption),
            Route("GET", specs, "volume:types:show", self.specs_show),
            Route("POST", specs, "volume:types:update", self.specs_add),
            Route("GET", f"{specs}/{{key}}", "volume:types:show", self.spec_show),
            Route("PUT", f"{specs}/{{key}}", "volume:types:update", self.spec_set),
            Route("DELETE", f"{specs}/{{key}}", "volume:types:update", self.spec_delete),
            Route("GET", access, "volume:types:access", self.access_list),
            Route("POST", f"{one}/action", "volume:types:access", self.action),
        ]

    async def type_list(self, request: Request) -> Answer:
        records = await types_visible(self._store, request.context.project_id, is_admin=request.context.is_admin)
        public = request.query_one("is_public")
        if request.context.is_admin and public not in (None, "None", "none", ""):
            records = [one for one in records if one.public == flag("is_public", public or "")]
        elif request.context.is_admin and public is None:
            records = [one for one in records if one.public]
        return json_answer({"volume_types": [self._view(request, one) for one in records]})

    async def type_show(self, request: Request) -> Answer:
        return json_answer({"volume_type": self._view(request, await self._fetch(request))})

    async def type_create(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.TypeBody)).volume_type
        name = _name(wanted.name)
        public = wanted.is_public if wanted.is_public is not msgspec.UNSET else True
        record = TypeRecord(
            str(uuid.uuid4()), name, wanted.description, bool(public), dict(wanted.extra_specs or {}), now_us()
        )
        await sql.type_insert(self._store, record)
        return json_answer({"volume_type": self._view(request, record)})

    async def type_update(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.TypeUpdateBody)).volume_type
        record = await self._fetch(request)
        changes: dict[str, Any] = {}
        if wanted.name is not None:
            changes["name"] = _name(wanted.name)
        if wanted.description is not msgspec.UNSET:
            changes["description"] = wanted.description
        if wanted.is_public is not None:
            changes["public"] = wanted.is_public
        if not changes:
            raise BadRequest("Specify volume type name, description, is_public or a combination thereof.")
        changed = msgspec.structs.replace(record, **changes)
        if record.name == DEFAULT_TYPE and not (changed.name == DEFAULT_TYPE and changed.public):
            raise BadRequest(f"{DEFAULT_TYPE} is the type of volumes for which none is named: name and access stay.")
        await sql.type_update(self._store, changed)
        return json_answer({"volume_type": self._view(request, changed)})

    async def type_delete(self, request: Request) -> Answer:
        record = await self._fetch(request)
        if record.name == DEFAULT_TYPE:
            raise BadRequest(f"{DEFAULT_TYPE} is the type of volumes for which none is named: it cannot be deleted.")
        in_use = Conflict(f"Target volume type is still in use: {record.id}")
        await sql.type_delete(self._store, record.id, in_use)
        return empty_answer(202)

    async def encryption(self, request: Request) -> Answer:
        """No type encrypts."""
        await self._fetch(request)
        return json_answer({})

    # --- extra specs --------------------------------------------------------------------------------------------------

    async def specs_show(self, request: Request) -> Answer:
        record = await self._fetch(request)
        return json_answer({"extra_specs": self._view(request, record)["extra_specs"]})

    async def specs_add(self, request: Request) -> Answer:
        new = (await schemas.read(request, schemas.ExtraSpecsBody)).extra_specs
        record = await self._fetch(request)
        await self._set_specs(record, {**record.extra_specs, **new})
        return json_answer({"extra_specs": new})

    async def spec_show(self, request: Request) -> Answer:
        key, shown = request.params["key"], self._view(request, await self._fetch(request))["extra_specs"]
        if key not in shown:
            raise NotFound(f"Volume Type {request.params['type_id']} has no extra specs with key {key[:255]}.")
        return json_answer({key: shown[key]})

    async def spec_set(self, request: Request) -> Answer:
        key, new = request.params["key"], await schemas.read(request, schemas.Metadata)
        if list(new) != [key]:
            raise BadRequest(f"Invalid input: the body must have the key {key[:255]!r} alone.")
        record = await self._fetch(request)
        await self._set_specs(record, {**record.extra_specs, **new})
        return json_answer(new)

    async def spec_delete(self, request: Request) -> Answer:
        key, record = request.params["key"], await self._fetch(request)
        if key not in record.extra_specs:
            raise NotFound(f"Volume Type {record.id} has no extra specs with key {key[:255]}.")
        await self._set_specs(record, {name: value for name, value in record.extra_specs.items() if name != key})
        return empty_answer(202)

    async def _set_specs(self, record: TypeRecord, specs: dict[str, str]) -> None:
        if len(specs) > schemas.METADATA_MAX:
            raise BadRequest(f"A volume type may have {schemas.METADATA_MAX} extra specs.")
        await sql.type_update(self._store, msgspec.structs.replace(record, extra_specs=specs))

    # --- access -------------------------------------------------------------------------------------------------------

    async def access_list(self, request: Request) -> Answer:
        record = await self._fetch(request)
        if record.public:
            raise NotFound(f"Access list not available for public volume type {record.id}.")
        projects = await sql.type_access_list(self._store, record.id)
        shown = [{"volume_type_id": record.id, "project_id": one} for one in projects]
        return json_answer({"volume_type_access": shown})

    async def action(self, request: Request) -> Answer:
        body = await schemas.read(request, dict[str, Any])
        record = await self._fetch(request)
        match list(body):
            case ["addProjectAccess"] | ["removeProjectAccess"]:
                [(name, given)] = body.items()
                project_id = schemas.convert(given, schemas.Access).project
            case _:
                raise BadRequest(f"There is no such action: {', '.join(body)[:100]}")
        if record.public:
            raise Conflict(f"Volume type {record.id} is public: everybody has access to it.")
        await sql.type_access_change(self._store, record.id, project_id, add=name == "addProjectAccess")
        return empty_answer(202)

    async def _fetch(self, request: Request) -> TypeRecord:
        context, wanted = request.context, request.params["type_id"]
        return await type_find(
            self._store, DEFAULT_TYPE if wanted == "default" else wanted, context.project_id, is_admin=context.is_admin
        )

    def _view(self, request: Request, record: TypeRecord) -> dict[str, Any]:
        return type_view(record, is_admin=request.context.is_admin)


def _name(text: str) -> str:
    if not text.strip():
        raise BadRequest(f"Invalid input for field/attribute name. Value: {text}. It must not be blank.")
    return text.strip()
