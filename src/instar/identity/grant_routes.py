"""Who has which role where: grants on projects, domains and the system, and the list of all assignments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instar.errors import NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.identity.local import ROLES_MAX, LocalIdentity
from instar.identity.policy import require_self_or
from instar.identity.roles import with_implied
from instar.identity.views import role_view
from instar.store.contract import Value
from instar.store.identity import DOMAINS, GROUPS, PROJECTS, ROLES, USERS, Assignment, Group, Project, User

_FILTERS = {
    "user.id": ("actor_type", "user", "actor_id"),
    "group.id": ("actor_type", "group", "actor_id"),
    "scope.project.id": ("target_type", "project", "target_id"),
    "scope.domain.id": ("target_type", "domain", "target_id"),
}


class GrantRoutes:
    def __init__(self, identity: LocalIdentity) -> None:
        self._records = identity.records
        self._list_max = identity.settings.api.list_limit_max

    def routes(self) -> list[Route]:
        routes = [Route("GET", "/v3/role_assignments", "identity:list_role_assignments", self.assignment_list)]
        for target in ("/v3/projects/{project_id}", "/v3/domains/{domain_id}", "/v3/system"):
            for actor in ("/users/{user_id}", "/groups/{group_id}"):
                path = f"{target}{actor}/roles"
                routes += [
                    Route("GET", path, "identity:list_grants", self.grant_list),
                    Route("GET", path + "/{role_id}", "identity:check_grant", self.grant_check),
                    Route("PUT", path + "/{role_id}", "identity:create_grant", self.grant_create),
                    Route("DELETE", path + "/{role_id}", "identity:revoke_grant", self.grant_revoke),
                ]
        return routes

    # --- grants -----------------------------------------------------------------------------------------------------

    async def grant_list(self, request: Request) -> Answer:
        wanted = _named(request, "")
        equals: dict[str, Value] = {
            "actor_type": wanted.actor_type,
            "actor_id": wanted.actor_id,
            "target_type": wanted.target_type,
            "target_id": wanted.target_id,
        }
        await self._check_exist(wanted)
        found = {one.role_id for one in await self._records.assignment_list(equals, limit=ROLES_MAX)}
        roles = await self._records.list(ROLES, {}, limit=ROLES_MAX)
        views = [role_view(request, role) for role in roles if role.id in found]
        return json_answer({"roles": views, "links": _links(request)})

    async def grant_check(self, request: Request) -> Answer:
        wanted = _named(request, request.params["role_id"])
        equals: dict[str, Value] = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
        if not await self._records.assignment_list(equals, limit=1):
            raise NotFound("Could not find role assignment.", kind="role assignment", id=wanted.role_id)
        return empty_answer()

    async def grant_create(self, request: Request) -> Answer:
        wanted = _named(request, request.params["role_id"])
        await self._records.fetch(ROLES, wanted.role_id)
        await self._check_exist(wanted)
        await self._records.assignment_add(wanted)
        return empty_answer()

    async def grant_revoke(self, request: Request) -> Answer:
        await self._records.assignment_remove(_named(request, request.params["role_id"]))
        return empty_answer()

    async def _check_exist(self, wanted: Assignment) -> None:
        """Raises NotFound that names the actor or the target."""
        if wanted.actor_type == "user":
            await self._records.fetch(USERS, wanted.actor_id)
        else:
            await self._records.fetch(GROUPS, wanted.actor_id)
        if wanted.target_type == "project":
            await self._records.fetch(PROJECTS, wanted.target_id)
        elif wanted.target_type == "domain":
            await self._records.fetch(DOMAINS, wanted.target_id)

    # --- all assignments --------------------------------------------------------------------------------------------

    async def assignment_list(self, request: Request) -> Answer:
        """`effective`: groups are resolved to their members and implied roles are listed as well."""
        user_id = request.query_one("user.id")
        require_self_or(request.context, user_id or "", "identity:list_role_assignments")
        effective, names = _flag(request, "effective"), _flag(request, "include_names")
        role_id = request.query_one("role.id")
        equals: dict[str, Value] = {}
        for name, (type_column, kind, id_column) in _FILTERS.items():
            value = request.query_one(name)
            if value is not None and not (effective and name == "user.id"):
                equals[type_column], equals[id_column] = kind, value
        if request.query_one("scope.system") is not None:
            equals["target_type"] = "system"
        if effective and user_id is not None:
            equals["user_id"] = user_id
        if role_id is not None and not effective:
            equals["role_id"] = role_id
        found = list(await self._records.assignment_list(equals, limit=self._list_max))
        if effective:
            found = [
                one
                for one in await self._effective(found)
                if role_id in (None, one.role_id) and user_id in (None, one.actor_id)
            ]
        names_of = await self._names(found) if names else {}
        views = [_assignment_view(request, one, names_of) for one in found]
        return json_answer({"role_assignments": views, "links": _links(request)})

    async def _effective(self, assignments: list[Assignment]) -> list[Assignment]:
        roles = await self._records.list(ROLES, {}, limit=ROLES_MAX)
        name_of = {role.id: role.name for role in roles}
        id_of = {role.name: role.id for role in roles}
        found: dict[Assignment, None] = {}
        for one in assignments:
            actors = [one.actor_id]
            if one.actor_type == "group":
                members = await self._records.group_members(one.actor_id, limit=self._list_max)
                actors = [user.id for user in members]
            for actor_id in actors:
                for name in sorted(with_implied([name_of[one.role_id]])):
                    found[Assignment("user", actor_id, one.target_type, one.target_id, id_of[name])] = None
        return list(found)[: self._list_max]

    async def _names(self, assignments: list[Assignment]) -> dict[tuple[str, str], dict[str, Any]]:
        """(kind, id) → what a view shows of it by name."""
        names: dict[tuple[str, str], dict[str, Any]] = {}
        domains = {domain.id: domain.name for domain in await self._records.list(DOMAINS, {}, limit=self._list_max)}
        for domain_id, name in domains.items():
            names["domain", domain_id] = {"id": domain_id, "name": name}
        for role in await self._records.list(ROLES, {}, limit=ROLES_MAX):
            names["role", role.id] = {"id": role.id, "name": role.name}
        for kind, record_id in {(one.actor_type, one.actor_id) for one in assignments} | {
            (one.target_type, one.target_id) for one in assignments
        }:
            for record in await self._actor_or_project(kind, record_id):
                domain = {"id": record.domain_id, "name": domains.get(record.domain_id, "")}
                names[kind, record_id] = {"id": record.id, "name": record.name, "domain": domain}
        return names

    async def _actor_or_project(self, kind: str, record_id: str) -> Sequence[User | Group | Project]:
        equals = {"id": record_id}
        if kind == "user":
            return await self._records.list(USERS, equals, limit=1)
        if kind == "group":
            return await self._records.list(GROUPS, equals, limit=1)
        if kind == "project":
            return await self._records.list(PROJECTS, equals, limit=1)
        return []


def _named(request: Request, role_id: str) -> Assignment:
    """What the path names."""
    params = request.params
    actor = ("user", params["user_id"]) if "user_id" in params else ("group", params["group_id"])
    if "project_id" in params:
        return Assignment(*actor, "project", params["project_id"], role_id)
    if "domain_id" in params:
        return Assignment(*actor, "domain", params["domain_id"], role_id)
    return Assignment(*actor, "system", "all", role_id)


def _flag(request: Request, name: str) -> bool:
    value = request.query_one(name)
    return value is not None and value.lower() not in ("0", "false", "no", "off")


def _links(request: Request) -> dict[str, Any]:
    return {"self": f"{request.origin}{request.path}", "previous": None, "next": None}


def _assignment_view(
    request: Request, one: Assignment, names: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    def shown(kind: str, record_id: str) -> dict[str, Any]:
        return names.get((kind, record_id), {"id": record_id})

    if one.target_type == "system":
        scope: dict[str, Any] = {"system": {"all": True}}
        target = "system"
    else:
        scope = {one.target_type: shown(one.target_type, one.target_id)}
        target = f"{one.target_type}s/{one.target_id}"
    return {
        "role": shown("role", one.role_id),
        one.actor_type: shown(one.actor_type, one.actor_id),
        "scope": scope,
        "links": {
            "assignment": f"{request.base_url}/v3/{target}/{one.actor_type}s/{one.actor_id}/roles/{one.role_id}"
        },
    }
