"""Tokens, what a caller may scope to, the catalog, and the version documents."""

from __future__ import annotations

from typing import Any

from instar.errors import Forbidden, NotFound, Unauthorized
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.identity.catalog import INTERFACES, SERVICES, catalog_view, endpoint_id
from instar.identity.local import LocalIdentity, Standing
from instar.identity.login import log_in
from instar.identity.policy import IDENTITY_POLICY, require_self_or
from instar.identity.schemas import AuthBody
from instar.identity.views import domain_view, link, project_view, token_view

VERSION_UPDATED = "2018-10-15T00:00:00Z"  # v3.14, the last version of the Identity API


class AuthRoutes:
    def __init__(self, identity: LocalIdentity) -> None:
        self._identity = identity
        self._list_max = identity.settings.api.list_limit_max

    def routes(self) -> list[Route]:
        fixed = [
            Route(method, f"/v3/{kind}{below}", "identity:change_catalog", self.catalog_change)
            for kind in ("services", "endpoints", "regions")
            for method, below in (("POST", ""), ("PATCH", "/{id}"), ("PUT", "/{id}"), ("DELETE", "/{id}"))
        ]
        return [
            Route("GET", "", "identity:versions", self.version_list),
            Route("GET", "/v3", "identity:versions", self.version_show),
            Route("POST", "/v3/auth/tokens", "identity:authenticate", self.token_issue),
            Route("GET", "/v3/auth/tokens", "identity:validate_token", self.token_show),
            Route("DELETE", "/v3/auth/tokens", "identity:revoke_token", self.token_revoke),
            Route("GET", "/v3/auth/projects", "identity:get_auth_projects", self.auth_projects),
            Route("GET", "/v3/auth/domains", "identity:get_auth_domains", self.auth_domains),
            Route("GET", "/v3/auth/system", "identity:get_auth_system", self.auth_system),
            Route("GET", "/v3/auth/catalog", "identity:get_auth_catalog", self.auth_catalog),
            Route("GET", "/v3/services", "identity:list_catalog", self.service_list),
            Route("GET", "/v3/services/{id}", "identity:list_catalog", self.service_show),
            Route("GET", "/v3/endpoints", "identity:list_catalog", self.endpoint_list),
            Route("GET", "/v3/endpoints/{id}", "identity:list_catalog", self.endpoint_show),
            Route("GET", "/v3/regions", "identity:list_catalog", self.region_list),
            Route("GET", "/v3/regions/{id}", "identity:list_catalog", self.region_show),
            *fixed,
        ]

    # --- versions ---------------------------------------------------------------------------------------------------

    async def version_list(self, request: Request) -> Answer:
        return json_answer({"versions": {"values": [_version(request)]}}, status=300)

    async def version_show(self, request: Request) -> Answer:
        return json_answer({"version": _version(request)})

    # --- tokens -----------------------------------------------------------------------------------------------------

    async def token_issue(self, request: Request) -> Answer:
        body = await request.json(AuthBody)
        token, standing = await log_in(self._identity, body.auth, request.client_address)
        headers = [(b"x-subject-token", token.encode()), (b"vary", b"X-Auth-Token")]
        return json_answer({"token": self._token_view(request, standing)}, 201, headers)

    async def token_show(self, request: Request) -> Answer:
        token, standing = await self._subject(request)
        allowed = IDENTITY_POLICY.allows(request.context, "identity:validate_token:service")
        if not allowed:
            require_self_or(request.context, standing.user.id, "identity:validate_token")
        headers = [(b"x-subject-token", token.encode()), (b"vary", b"X-Auth-Token")]
        return json_answer({"token": self._token_view(request, standing)}, headers=headers)

    async def token_revoke(self, request: Request) -> Answer:
        _, standing = await self._subject(request)
        require_self_or(request.context, standing.user.id, "identity:revoke_token")
        await self._identity.revoke(standing.claims)
        return empty_answer()

    async def _subject(self, request: Request) -> tuple[str, Standing]:
        token = request.header(b"x-subject-token")
        try:
            return token, await self._identity.verify(token)
        except Unauthorized as error:
            raise NotFound("Could not find token.", kind="token", id="") from error

    def _token_view(self, request: Request, standing: Standing) -> dict[str, Any]:
        wants_catalog = "nocatalog" not in dict(request.query)
        return token_view(standing, self._catalog(request) if wants_catalog else None)

    def _catalog(self, request: Request) -> list[dict[str, Any]]:
        return catalog_view(self._identity.base_url or request.origin, self._identity.settings.region)

    # --- what the caller may scope to -------------------------------------------------------------------------------

    async def auth_projects(self, request: Request) -> Answer:
        projects = await self._identity.records.projects_of_user(request.context.user_id, limit=self._list_max)
        return self._listed(request, "projects", [project_view(request, one) for one in projects])

    async def auth_domains(self, request: Request) -> Answer:
        domains = await self._identity.records.domains_of_user(request.context.user_id, limit=self._list_max)
        return self._listed(request, "domains", [domain_view(request, one) for one in domains])

    async def auth_system(self, request: Request) -> Answer:
        roles = await self._identity.records.roles_held(request.context.user_id, "system", "all")
        return self._listed(request, "system", [{"all": True}] if roles else [])

    async def auth_catalog(self, request: Request) -> Answer:
        if not request.context.roles:
            raise Forbidden("A token without a scope has no catalog.")
        return self._listed(request, "catalog", self._catalog(request))

    def _listed(self, request: Request, key: str, views: list[dict[str, Any]]) -> Answer:
        own = f"{request.origin}{request.path}"
        return json_answer({key: views, "links": {"self": own, "previous": None, "next": None}})

    # --- the catalog, to read ---------------------------------------------------------------------------------------

    async def service_list(self, request: Request) -> Answer:
        return self._listed(request, "services", _filtered(request, self._services(request), ("name", "type")))

    async def service_show(self, request: Request) -> Answer:
        return json_answer({"service": _one(request, self._services(request), "service")})

    async def endpoint_list(self, request: Request) -> Answer:
        keys = ("interface", "service_id", "region", "region_id")
        return self._listed(request, "endpoints", _filtered(request, self._endpoints(request), keys))

    async def endpoint_show(self, request: Request) -> Answer:
        return json_answer({"endpoint": _one(request, self._endpoints(request), "endpoint")})

    async def region_list(self, request: Request) -> Answer:
        return self._listed(request, "regions", self._regions(request))

    async def region_show(self, request: Request) -> Answer:
        return json_answer({"region": _one(request, self._regions(request), "region")})

    async def catalog_change(self, request: Request) -> Answer:
        raise Forbidden("The catalog of this cloud is fixed: every API is behind the one port that it listens on.")

    def _services(self, request: Request) -> list[dict[str, Any]]:
        return [
            {
                "id": service.id,
                "name": service.name,
                "type": service.type,
                "enabled": True,
                "description": "",
                "links": link(request, f"services/{service.id}"),
            }
            for service in SERVICES
        ]

    def _endpoints(self, request: Request) -> list[dict[str, Any]]:
        region = self._identity.settings.region
        base_url = self._identity.base_url or request.origin
        return [
            {
                "id": endpoint_id(service, interface),
                "service_id": service.id,
                "interface": interface,
                "region": region,
                "region_id": region,
                "enabled": True,
                "url": base_url + service.path,
                "links": link(request, f"endpoints/{endpoint_id(service, interface)}"),
            }
            for service in SERVICES
            for interface in INTERFACES
        ]

    def _regions(self, request: Request) -> list[dict[str, Any]]:
        region = self._identity.settings.region
        return [
            {"id": region, "description": "", "parent_region_id": None, "links": link(request, f"regions/{region}")}
        ]


def _version(request: Request) -> dict[str, Any]:
    return {
        "id": "v3.14",
        "status": "stable",
        "updated": VERSION_UPDATED,
        "links": [{"rel": "self", "href": f"{request.base_url}/v3/"}],
        "media-types": [{"base": "application/json", "type": "application/vnd.openstack.identity-v3+json"}],
    }


def _filtered(request: Request, views: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    wanted = {key: value for key in keys if (value := request.query_one(key)) is not None}
    return [view for view in views if all(view[key] == value for key, value in wanted.items())]


def _one(request: Request, views: list[dict[str, Any]], word: str) -> dict[str, Any]:
    for view in views:
        if view["id"] == request.params["id"]:
            return view
    raise NotFound(f"Could not find {word}: {request.params['id'][:64]}.", kind=word, id=request.params["id"])
