"""Quotas and limits: what a project may have, what it has, and for admins how much that should be.

The API's names of resources differ from ours; one table has both, with the microversions at which each is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from instar.api.body import Limit, until
from instar.api.resource import ApiRoute, Compute, read_body
from instar.api.servers.bodies import Record
from instar.errors import BadRequest, Forbidden, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.store.instances import usage_fetch
from instar.store.quotas import (
    CLASS_PROJECT,
    quota_count,
    quota_limits,
    quota_limits_default,
    quota_reset,
    quota_set,
)

_NAME, _CLASS = "os_compute_api:os-quota-sets:", "os_compute_api:os-quota-class-sets:"
NETWORK_UNTIL, FILES_UNTIL, GROUPS_IN_CLASSES_SINCE = 35, 56, 50
CLASS_NETWORK_UNTIL = 49


class Resource(NamedTuple):
    """`setting` is our name; None: a limit of networks that is not ours, shown as unlimited where it is shown."""

    name: str
    setting: str | None
    last: int | None = None


RESOURCES = (
    Resource("instances", "instances"), Resource("cores", "cores"), Resource("ram", "ram"),
    Resource("metadata_items", "metadata_items"), Resource("key_pairs", "key_pairs"),
    Resource("server_groups", "server_groups"), Resource("server_group_members", "server_group_members"),
    Resource("injected_files", "injected_files", FILES_UNTIL),
    Resource("injected_file_content_bytes", "injected_file_content_bytes", FILES_UNTIL),
    Resource("injected_file_path_bytes", "injected_file_path_bytes", FILES_UNTIL),
    Resource("fixed_ips", None, NETWORK_UNTIL), Resource("floating_ips", None, NETWORK_UNTIL),
    Resource("security_groups", None, NETWORK_UNTIL), Resource("security_group_rules", None, NETWORK_UNTIL),
)  # fmt: skip
_CLASS_LATE = ("server_groups", "server_group_members")


class QuotaChanges(Record, frozen=True):
    instances: Limit | UnsetType = UNSET
    cores: Limit | UnsetType = UNSET
    ram: Limit | UnsetType = UNSET
    metadata_items: Limit | UnsetType = UNSET
    key_pairs: Limit | UnsetType = UNSET
    server_groups: Limit | UnsetType = UNSET
    server_group_members: Limit | UnsetType = UNSET
    injected_files: Annotated[Limit | UnsetType, until(FILES_UNTIL)] = UNSET
    injected_file_content_bytes: Annotated[Limit | UnsetType, until(FILES_UNTIL)] = UNSET
    injected_file_path_bytes: Annotated[Limit | UnsetType, until(FILES_UNTIL)] = UNSET
    fixed_ips: Annotated[Limit | UnsetType, until(NETWORK_UNTIL)] = UNSET
    floating_ips: Annotated[Limit | UnsetType, until(NETWORK_UNTIL)] = UNSET
    security_groups: Annotated[Limit | UnsetType, until(NETWORK_UNTIL)] = UNSET
    security_group_rules: Annotated[Limit | UnsetType, until(NETWORK_UNTIL)] = UNSET
    force: bool | UnsetType = UNSET
    tenant_id: str | UnsetType = UNSET


class UpdateQuota(Record, frozen=True):
    quota_set: QuotaChanges


class ClassChanges(QuotaChanges, frozen=True):
    pass


class UpdateQuotaClass(Record, frozen=True):
    quota_class_set: ClassChanges


def _shown(limits: Mapping[str, int], version: int) -> dict[str, int]:
    return {
        one.name: limits[one.setting] if one.setting else -1 for one in RESOURCES if one.last is None or version <= one.last
    }


def _class_shown(limits: Mapping[str, int], version: int) -> dict[str, int]:
    """Classes learned of server groups, and forgot networks, at versions of their own."""
    shown = {}
    for one in RESOURCES:
        last = CLASS_NETWORK_UNTIL if one.setting is None else one.last
        late = one.name in _CLASS_LATE and version < GROUPS_IN_CLASSES_SINCE
        if (last is None or version <= last) and not late:
            shown[one.name] = limits[one.setting] if one.setting else -1
    return shown


def _changes(given: QuotaChanges) -> dict[str, int]:
    ours = {one.name for one in RESOURCES if one.setting}
    values = {name: getattr(given, name) for name in given.__struct_fields__}
    return {name: value for name, value in values.items() if name in ours and value is not UNSET}


async def _used(compute: Compute, project_id: str, user_id: str) -> dict[str, int]:
    """What is in use of each limited thing; those that belong to one server count nothing for a project."""
    used = await usage_fetch(compute.store, project_id)
    groups = await quota_count(compute.store, "server_groups", project_id)
    return used | {"server_groups": groups, "key_pairs": await quota_count(compute.store, "key_pairs", user_id)}


class QuotaSets:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        path = "/os-quota-sets/{project_id}"
        return [
            ApiRoute("GET", path, _NAME + "show", self.show),
            ApiRoute("GET", path + "/defaults", _NAME + "defaults", self.defaults),
            ApiRoute("GET", path + "/detail", _NAME + "detail", self.detail),
            ApiRoute("PUT", path, _NAME + "update", self.update),
            ApiRoute("DELETE", path, _NAME + "delete", self.delete),
            ApiRoute("GET", "/os-quota-class-sets/{name}", _CLASS + "show", self.show_class),
            ApiRoute("PUT", "/os-quota-class-sets/{name}", _CLASS + "update", self.update_class),
        ]

    async def _project(self, request: Request, rule: str) -> str:
        """The project of the path: the caller's own, or any for admins. Raises Forbidden, BadRequest."""
        project_id = request.params["project_id"]
        if project_id == request.context.project_id:
            return project_id
        if not request.context.is_admin:
            raise Forbidden(action=_NAME + rule)
        if not await self._compute.identity.project_exists(project_id):
            raise BadRequest(f"Project ID {project_id[:80]} is not a valid project.")
        return project_id

    async def _limits(self, project_id: str) -> dict[str, int]:
        return await quota_limits(self._compute.store, self._compute.settings.quota, project_id)

    async def show(self, request: Request) -> Answer:
        project_id = await self._project(request, "show")
        shown = _shown(await self._limits(project_id), request.microversion)
        return json_answer({"quota_set": {"id": project_id, **shown}})

    async def defaults(self, request: Request) -> Answer:
        limits = await quota_limits_default(self._compute.store, self._compute.settings.quota)
        shown = _shown(limits, request.microversion)
        return json_answer({"quota_set": {"id": request.params["project_id"], **shown}})

    async def detail(self, request: Request) -> Answer:
        project_id = await self._project(request, "detail")
        used = await _used(self._compute, project_id, request.context.user_id)
        used["key_pairs"] = 0  # they belong to users, so a project has none
        shown: dict[str, Any] = {
            name: {"limit": limit, "in_use": used.get(name, 0), "reserved": 0}
            for name, limit in _shown(await self._limits(project_id), request.microversion).items()
        }
        return json_answer({"quota_set": {"id": project_id, **shown}})

    async def update(self, request: Request) -> Answer:
        project_id = await self._project(request, "update")
        if request.query_one("user_id") is not None:
            raise BadRequest("Limits of a single user in a project are not supported: set the project's.")
        given = (await read_body(request, UpdateQuota)).quota_set
        changes = _changes(given)
        if given.force is not True:
            await self._refuse_below_use(project_id, changes)
        await quota_set(self._compute.store, project_id, changes)
        return json_answer({"quota_set": _shown(await self._limits(project_id), request.microversion)})

    async def _refuse_below_use(self, project_id: str, changes: Mapping[str, int]) -> None:
        used = await usage_fetch(self._compute.store, project_id)
        for name, limit in changes.items():
            if 0 <= limit < used.get(name, 0):
                raise BadRequest(
                    f"Quota limit {limit} for {name} must be greater than or equal to already used {used[name]}."
                )

    async def delete(self, request: Request) -> Answer:
        if request.query_one("user_id") is not None:
            raise BadRequest("Limits of a single user in a project are not supported.")
        await quota_reset(self._compute.store, await self._project(request, "delete"))
        return empty_answer(202)

    async def show_class(self, request: Request) -> Answer:
        name = request.params["name"]
        limits = await quota_limits_default(self._compute.store, self._compute.settings.quota)
        return json_answer({"quota_class_set": {"id": name, **_class_shown(limits, request.microversion)}})

    async def update_class(self, request: Request) -> Answer:
        if request.params["name"] != CLASS_PROJECT:
            raise NotFound(f"Quota class {request.params['name'][:80]} could not be found: only 'default' exists.")
        given = (await read_body(request, UpdateQuotaClass)).quota_class_set
        await quota_set(self._compute.store, CLASS_PROJECT, _changes(given))
        limits = await quota_limits_default(self._compute.store, self._compute.settings.quota)
        return json_answer({"quota_class_set": _class_shown(limits, request.microversion)})


class Limits(msgspec.Struct, frozen=True):
    """`GET /limits`: the limits of the caller's project and how much of them is used."""

    compute: Compute

    def routes(self) -> list[ApiRoute]:
        return [ApiRoute("GET", "/limits", "os_compute_api:limits", self.show)]

    async def show(self, request: Request) -> Answer:
        context, version = request.context, request.microversion
        project_id = request.query_one("tenant_id") or context.project_id
        if project_id != context.project_id and not context.is_admin:
            raise Forbidden(action="os_compute_api:limits:other_project")
        limits = await quota_limits(self.compute.store, self.compute.settings.quota, project_id)
        used = await _used(self.compute, project_id, context.user_id)
        absolute = {
            "maxServerMeta": limits["metadata_items"],
            "maxTotalInstances": limits["instances"],
            "maxTotalCores": limits["cores"],
            "maxTotalRAMSize": limits["ram"],
            "maxTotalKeypairs": limits["key_pairs"],
            "maxServerGroups": limits["server_groups"],
            "maxServerGroupMembers": limits["server_group_members"],
            "totalInstancesUsed": used["instances"],
            "totalCoresUsed": used["cores"],
            "totalRAMUsed": used["ram"],
            "totalServerGroupsUsed": used["server_groups"],
        }
        if version <= NETWORK_UNTIL:
            absolute |= {
                "maxSecurityGroups": -1, "maxSecurityGroupRules": -1, "maxTotalFloatingIps": -1,
                "totalSecurityGroupsUsed": 0, "totalFloatingIpsUsed": 0,
            }  # fmt: skip
        if version <= 38:
            absolute["maxImageMeta"] = limits["metadata_items"]
        if version <= FILES_UNTIL:
            absolute |= {
                "maxPersonality": limits["injected_files"],
                "maxPersonalitySize": limits["injected_file_content_bytes"],
            }
        return json_answer({"limits": {"rate": [], "absolute": absolute}})
