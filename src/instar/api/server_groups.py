"""Server groups: servers that should be together, or apart."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from instar.api.body import Name, Positive, since, until
from instar.api.resource import ApiRoute, Compute, boolean, integer, read_body, refuse_unknown
from instar.api.servers.bodies import Record
from instar.clock import now_us
from instar.errors import BadRequest, Forbidden
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.policy import own_project
from instar.http.request import Request
from instar.store.quotas import quota_limits, quota_take_one
from instar.store.server_groups import (
    POLICIES,
    ServerGroup,
    server_group_create,
    server_group_delete,
    server_group_fetch,
    server_group_list,
)

OWNER_SINCE, SOFT_SINCE, POLICY_SINCE = 13, 15, 64
_NAME = "os_compute_api:os-server-groups:"


class Rules(Record, frozen=True):
    max_server_per_host: Positive


class NewServerGroup(Record, frozen=True):
    name: Name
    policies: Annotated[Annotated[list[str], Meta(min_length=1, max_length=1)] | UnsetType, until(63)] = UNSET
    policy: Annotated[str | UnsetType, since(POLICY_SINCE)] = UNSET
    rules: Annotated[Rules | UnsetType, since(POLICY_SINCE)] = UNSET


class CreateServerGroup(Record, frozen=True):
    server_group: NewServerGroup


class ServerGroups:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        return [
            ApiRoute("GET", "/os-server-groups", _NAME + "index", self.index),
            ApiRoute("POST", "/os-server-groups", _NAME + "create", self.create),
            ApiRoute("GET", "/os-server-groups/{id}", _NAME + "show", self.show),
            ApiRoute("DELETE", "/os-server-groups/{id}", _NAME + "delete", self.delete),
        ]

    async def index(self, request: Request) -> Answer:
        context = request.context
        if request.microversion >= 75:
            refuse_unknown(request, frozenset({"all_projects", "limit", "offset"}))
        project_id: str | None = context.project_id
        everyone = request.query_one("all_projects")
        if everyone is not None and (everyone == "" or boolean("all_projects", everyone)):
            if not context.is_admin:
                raise Forbidden(action=_NAME + "index:all_projects")
            project_id = None
        bound = self._compute.settings.api.list_limit_max
        limit = min(integer("limit", request.query_one("limit") or "0") or bound, bound)
        offset = integer("offset", request.query_one("offset") or "0")
        groups = await server_group_list(self._compute.store, project_id=project_id, limit=limit, offset=offset)
        return json_answer({"server_groups": [_view(group, request.microversion) for group in groups]})

    async def create(self, request: Request) -> Answer:
        given, version, context = (
            (await read_body(request, CreateServerGroup)).server_group,
            request.microversion,
            request.context,
        )
        policy = _policy(given, version)
        rules: dict[str, Any] = {}
        if not isinstance(given.rules, UnsetType):
            if policy != "anti-affinity":
                raise BadRequest("Invalid input: server_group.rules: only policy 'anti-affinity' has rules.")
            rules["max_server_per_host"] = given.rules.max_server_per_host
        group = ServerGroup(
            id=str(uuid.uuid4()),
            project_id=context.project_id,
            user_id=context.user_id,
            name=given.name,
            policy=policy,
            rules=rules,
            created_at=now_us(),
        )
        limits = await quota_limits(self._compute.store, self._compute.settings.quota, context.project_id)
        room = quota_take_one("server_groups", context.project_id, limits["server_groups"])
        await self._compute.store.write(*room, server_group_create(group))
        return json_answer({"server_group": _view(group, version)})

    async def show(self, request: Request) -> Answer:
        return json_answer({"server_group": _view(await self._group(request), request.microversion)})

    async def delete(self, request: Request) -> Answer:
        group = await self._group(request)
        await self._compute.store.write(*server_group_delete(group.id))
        return empty_answer(204)

    async def _group(self, request: Request) -> ServerGroup:
        group_id = request.params["id"]
        group = await server_group_fetch(self._compute.store, group_id)
        own_project(request.context, group.project_id, "Server group", group_id)
        return group


def _policy(given: NewServerGroup, version: int) -> str:
    if version >= POLICY_SINCE:
        if isinstance(given.policy, UnsetType):
            raise BadRequest("Invalid input: server_group: 'policy' is a required property")
        policy, where = given.policy, "policy"
    else:
        if isinstance(given.policies, UnsetType):
            raise BadRequest("Invalid input: server_group: 'policies' is a required property")
        policy, where = given.policies[0], "policies[0]"
    known = [one for one in POLICIES if version >= SOFT_SINCE or not one.startswith("soft-")]
    if policy not in known:
        raise BadRequest(f"Invalid input: server_group.{where}: {policy[:40]!r} is not one of {known}")
    return policy


def _view(group: ServerGroup, version: int) -> dict[str, Any]:
    view: dict[str, Any] = {"id": group.id, "name": group.name, "members": group.members}
    if version >= POLICY_SINCE:
        view |= {"policy": group.policy, "rules": group.rules}
    else:
        view |= {"policies": [group.policy], "metadata": {}}
    if version >= OWNER_SINCE:
        view |= {"project_id": group.project_id, "user_id": group.user_id}
    return view
