"""Key pairs of a user: import, make (until 2.91), list, show, delete. Admins may name another user from 2.10 on."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from instar.api import ssh_keys
from instar.api.body import since
from instar.api.resource import ApiRoute, Compute, add_next, page_of, read_body, refuse_unknown
from instar.api.servers.bodies import Record
from instar.clock import iso_us, now_us
from instar.errors import BadRequest, Forbidden, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.store.key_pairs import KeyPair, key_pair_delete, key_pair_fetch, key_pair_insert, key_pair_list
from instar.store.quotas import quota_limits

TYPE_SINCE, USER_SINCE, PAGING_SINCE, IMPORT_ONLY_SINCE = 2, 10, 35, 92
_NAME = "os_compute_api:os-keypairs:"
_OLD_NAME, _NEW_NAME = re.compile(r"[a-zA-Z0-9_\- ]+"), re.compile(r"[a-zA-Z0-9_\- @.]+")
GENERATIONS = asyncio.Semaphore(2)  # making a key costs a CPU for a moment


class NewKeyPair(Record, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=255)]
    public_key: Annotated[str, Meta(max_length=ssh_keys.KEY_MAX_LENGTH)] | UnsetType = UNSET
    type: Annotated[Literal["ssh", "x509"] | UnsetType, since(TYPE_SINCE)] = UNSET
    user_id: Annotated[str | UnsetType, since(USER_SINCE)] = UNSET


class CreateKeyPair(Record, frozen=True):
    keypair: NewKeyPair


class KeyPairs:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        return [
            ApiRoute("GET", "/os-keypairs", _NAME + "index", self.index),
            ApiRoute("POST", "/os-keypairs", _NAME + "create", self.create),
            ApiRoute("GET", "/os-keypairs/{name}", _NAME + "show", self.show),
            ApiRoute("DELETE", "/os-keypairs/{name}", _NAME + "delete", self.delete),
        ]

    def _user(self, request: Request, named: str | None, rule: str) -> str:
        """Whose key pairs: the caller's, or for admins those of the user they name. Raises Forbidden."""
        context = request.context
        if not named or named == context.user_id:
            return context.user_id
        if not context.is_admin:
            raise Forbidden(action=_NAME + rule)
        return named

    def _user_of_query(self, request: Request, rule: str) -> str:
        named = request.query_one("user_id") if request.microversion >= USER_SINCE else None
        return self._user(request, named, rule)

    async def index(self, request: Request) -> Answer:
        version: int = request.microversion
        if version >= 75:
            refuse_unknown(request, frozenset({"user_id", "limit", "marker"}))
        user_id = self._user_of_query(request, "index")
        limit, marker = self._compute.settings.api.list_limit_max, None
        if version >= PAGING_SINCE:
            limit, marker = page_of(request, self._compute)
            if marker is not None:
                await self._expect_marker(user_id, marker)
        keys = await key_pair_list(self._compute.store, user_id, after=marker, limit=limit)
        found: dict[str, Any] = {"keypairs": [{"keypair": _view(key, version)} for key in keys]}
        if version >= PAGING_SINCE and len(keys) == limit:
            add_next(found, "keypairs", request, keys[-1].name)
        return json_answer(found)

    async def _expect_marker(self, user_id: str, name: str) -> None:
        try:
            await key_pair_fetch(self._compute.store, user_id, name)
        except NotFound as error:
            raise BadRequest(f"marker [{name}] not found") from error

    async def show(self, request: Request) -> Answer:
        user_id = self._user_of_query(request, "show")
        key = await key_pair_fetch(self._compute.store, user_id, request.params["name"])
        view = _view(key, request.microversion) | {
            "user_id": key.user_id,
            "id": int(key.id[:8], 16) & 0x7FFFFFFF,
            "created_at": iso_us(key.created_at),
            "deleted": False,
            "deleted_at": None,
            "updated_at": None,
        }
        return json_answer({"keypair": view})

    async def create(self, request: Request) -> Answer:
        new = (await read_body(request, CreateKeyPair)).keypair
        version, context = request.microversion, request.context
        pattern = _NEW_NAME if version >= IMPORT_ONLY_SINCE else _OLD_NAME
        if not pattern.fullmatch(new.name) or new.name != new.name.strip():
            raise BadRequest("Invalid input: keypair.name: contains characters that are not allowed.")
        user_id = self._user(request, None if isinstance(new.user_id, UnsetType) else new.user_id, "create")
        kind = "ssh" if isinstance(new.type, UnsetType) else new.type
        material = await self._material(new, kind, request)
        key = KeyPair(str(uuid.uuid4()), user_id, new.name, kind, material.fingerprint, material.public_key, now_us())
        limits = await quota_limits(self._compute.store, self._compute.settings.quota, context.project_id)
        await key_pair_insert(self._compute.store, key, limit=limits["key_pairs"])
        view = _view(key, version) | {"user_id": user_id}
        if material.private_key is not None:
            view["private_key"] = material.private_key
        return json_answer({"keypair": view}, 201 if version >= TYPE_SINCE else 200)

    async def _material(self, new: NewKeyPair, kind: str, request: Request) -> ssh_keys.KeyMaterial:
        if not isinstance(new.public_key, UnsetType):
            read = ssh_keys.import_ssh if kind == "ssh" else ssh_keys.import_x509
            return await asyncio.to_thread(read, new.public_key)
        if request.microversion >= IMPORT_ONLY_SINCE:
            raise BadRequest("Invalid input: keypair: 'public_key' is a required property")
        async with GENERATIONS:
            if kind == "ssh":
                return await asyncio.to_thread(ssh_keys.generate_ssh)
            return await asyncio.to_thread(ssh_keys.generate_x509, request.context.user_name)

    async def delete(self, request: Request) -> Answer:
        user_id = self._user_of_query(request, "delete")
        await key_pair_delete(self._compute.store, user_id, request.params["name"])
        return empty_answer(204 if request.microversion >= TYPE_SINCE else 202)


def _view(key: KeyPair, version: int) -> dict[str, Any]:
    view = {"name": key.name, "public_key": key.public_key, "fingerprint": key.fingerprint}
    if version >= TYPE_SINCE:
        view["type"] = key.type
    return view
