"""Quotas in the Network API: what a project may have of each resource."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from instar.errors import Forbidden
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.networks import schemas
from instar.networks.local import LocalNetworks
from instar.store.networks import network_quota, network_quota_projects, network_quota_reset, network_quota_set


class QuotaRoutes:
    def __init__(self, networks: LocalNetworks) -> None:
        self._store = networks.store
        settings = networks.settings
        self._defaults = {
            "network": settings.networks, "subnet": settings.subnets, "port": settings.ports,
            "security_group": settings.security_groups, "security_group_rule": settings.security_group_rules,
        }  # fmt: skip

    def routes(self) -> list[Route]:
        one = "/v2.0/quotas/{project_id}"
        return [
            Route("GET", "/v2.0/quotas", "network:quotas:list", self.quota_list),
            Route("GET", one, "network:quotas:show", self.quota_show),
            Route("GET", f"{one}/default", "network:quotas:show", self.quota_default),
            Route("GET", f"{one}/details", "network:quotas:show", self.quota_details),
            Route("PUT", one, "network:quotas:update", self.quota_update),
            Route("DELETE", one, "network:quotas:delete", self.quota_delete),
        ]

    async def quota_list(self, request: Request) -> Answer:
        """Projects that have limits of their own."""
        projects = await network_quota_projects(self._store)
        quotas = [{"project_id": one, "tenant_id": one, **await self._limits(one)} for one in projects]
        return json_answer({"quotas": quotas})

    async def quota_show(self, request: Request) -> Answer:
        return json_answer({"quota": await self._limits(_project(request))})

    async def quota_default(self, request: Request) -> Answer:
        _project(request)
        return json_answer({"quota": self._defaults})

    async def quota_details(self, request: Request) -> Answer:
        own, used = await network_quota(self._store, _project(request))
        details: dict[str, Any] = {
            resource: {"limit": own.get(resource, default), "used": used[resource], "reserved": 0}
            for resource, default in self._defaults.items()
        }
        return json_answer({"quota": details})

    async def quota_update(self, request: Request) -> Answer:
        wanted = (await schemas.read(request, schemas.LimitsBody)).quota
        limits = {
            resource: value for resource in self._defaults if (value := getattr(wanted, resource)) is not UNSET
        }
        project_id = request.params["project_id"]
        if limits:
            await network_quota_set(self._store, project_id, limits)
        return json_answer({"quota": await self._limits(project_id)})

    async def quota_delete(self, request: Request) -> Answer:
        await network_quota_reset(self._store, request.params["project_id"])
        return empty_answer()

    async def _limits(self, project_id: str) -> dict[str, int]:
        own, _ = await network_quota(self._store, project_id)
        return {**self._defaults, **own}


def _project(request: Request) -> str:
    """Raises Forbidden for another project than the caller's, unless that is an admin."""
    project_id = request.params["project_id"]
    if project_id != request.context.project_id and not request.context.is_admin:
        raise Forbidden(action="get_quota")
    return project_id
