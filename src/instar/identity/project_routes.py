"""Projects with their tags, domains, and roles."""

from __future__ import annotations

from uuid import uuid4

import msgspec
from msgspec import UNSET

from instar.errors import BadRequest, Forbidden, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.body import convert
from instar.http.request import Request
from instar.http.routing import Route
from instar.identity import schemas
from instar.identity.bootstrap import DEFAULT_DOMAIN
from instar.identity.listing import callers_domain, given_columns, list_answer
from instar.identity.local import ROLES_MAX, LocalIdentity
from instar.identity.policy import IDENTITY_POLICY
from instar.identity.roles import BUILT_IN, IMPLIES
from instar.identity.views import domain_view, link, project_view, role_view, tags_of
from instar.store.identity import DOMAINS, PROJECTS, ROLES, Domain, Project, Role


class ProjectRoutes:
    def __init__(self, identity: LocalIdentity) -> None:
        self._identity = identity
        self._records = identity.records

    def routes(self) -> list[Route]:
        tag = "/v3/projects/{id}/tags/{tag}"
        return [
            Route("GET", "/v3/projects", "identity:list_projects", self.project_list),
            Route("POST", "/v3/projects", "identity:create_project", self.project_create),
            Route("GET", "/v3/projects/{id}", "identity:get_project", self.project_show),
            Route("PATCH", "/v3/projects/{id}", "identity:update_project", self.project_update),
            Route("DELETE", "/v3/projects/{id}", "identity:delete_project", self.project_delete),
            Route("GET", "/v3/projects/{id}/tags", "identity:get_project", self.tag_list),
            Route("PUT", "/v3/projects/{id}/tags", "identity:update_project_tags", self.tag_replace),
            Route("DELETE", "/v3/projects/{id}/tags", "identity:update_project_tags", self.tag_clear),
            Route("GET", tag, "identity:get_project", self.tag_check),
            Route("PUT", tag, "identity:update_project_tags", self.tag_add),
            Route("DELETE", tag, "identity:update_project_tags", self.tag_remove),
            Route("GET", "/v3/domains", "identity:list_domains", self.domain_list),
            Route("POST", "/v3/domains", "identity:create_domain", self.domain_create),
            Route("GET", "/v3/domains/{id}", "identity:get_domain", self.domain_show),
            Route("PATCH", "/v3/domains/{id}", "identity:update_domain", self.domain_update),
            Route("DELETE", "/v3/domains/{id}", "identity:delete_domain", self.domain_delete),
            Route("GET", "/v3/roles", "identity:list_roles", self.role_list),
            Route("POST", "/v3/roles", "identity:create_role", self.role_create),
            Route("GET", "/v3/roles/{id}", "identity:get_role", self.role_show),
            Route("PATCH", "/v3/roles/{id}", "identity:update_role", self.role_update),
            Route("DELETE", "/v3/roles/{id}", "identity:delete_role", self.role_delete),
            Route("GET", "/v3/role_inferences", "identity:list_role_inferences", self.role_inferences),
        ]

    # --- projects ---------------------------------------------------------------------------------------------------

    async def project_list(self, request: Request) -> Answer:
        filters = ("name", "domain_id", "enabled")
        return await list_answer(self._identity, request, PROJECTS, "projects", project_view, filters)

    async def project_create(self, request: Request) -> Answer:
        wanted = (await request.json(schemas.NewProjectBody)).project
        domain_id = wanted.domain_id or wanted.parent_id or callers_domain(request.context)
        if wanted.is_domain:
            raise BadRequest("Domains are made by POST /v3/domains - at `$.project.is_domain`.")
        if wanted.parent_id not in (None, domain_id):
            raise BadRequest("Projects do not nest: the parent is the domain - at `$.project.parent_id`.")
        domain = await self._records.fetch(DOMAINS, domain_id)
        tags = msgspec.json.encode(list(dict.fromkeys(wanted.tags))).decode()
        project = Project(uuid4().hex, domain.id, wanted.name, wanted.description or "", wanted.enabled, tags)
        await self._records.insert(PROJECTS, project)
        return json_answer({"project": project_view(request, project)}, 201)

    async def project_show(self, request: Request) -> Answer:
        return json_answer({"project": project_view(request, await self._visible(request))})

    async def _visible(self, request: Request) -> Project:
        """Admins see every project, others those where they have a role."""
        project_id = request.params["id"]
        if project_id != request.context.project_id and not IDENTITY_POLICY.allows(
            request.context, "identity:get_project:other"
        ):
            roles = await self._records.roles_held(request.context.user_id, "project", project_id)
            if not roles:
                raise Forbidden(action="identity:get_project")
        return await self._records.fetch(PROJECTS, project_id)

    async def project_update(self, request: Request) -> Answer:
        changes = (await request.json(schemas.ChangedProjectBody)).project
        project = await self._records.fetch(PROJECTS, request.params["id"])
        if changes.domain_id not in (UNSET, project.domain_id):
            raise BadRequest("Cannot change Domain ID.")
        if changes.is_domain is True:
            raise BadRequest("A project cannot become a domain - at `$.project.is_domain`.")
        columns = given_columns(changes)
        if changes.tags is not UNSET:
            columns["tags"] = msgspec.json.encode(list(dict.fromkeys(changes.tags))).decode()
        await self._records.update(PROJECTS, project.id, columns, refuse_tokens=changes.enabled is False)
        return json_answer({"project": project_view(request, await self._records.fetch(PROJECTS, project.id))})

    async def project_delete(self, request: Request) -> Answer:
        await self._records.delete(PROJECTS, request.params["id"])
        return empty_answer()

    # --- tags -------------------------------------------------------------------------------------------------------

    async def tag_list(self, request: Request) -> Answer:
        project = await self._visible(request)
        return json_answer({"tags": tags_of(project), "links": link(request, f"projects/{project.id}/tags")})

    async def tag_check(self, request: Request) -> Answer:
        if request.params["tag"] not in tags_of(await self._visible(request)):
            raise NotFound("Could not find project tag.", kind="tag", id=request.params["tag"])
        return empty_answer()

    async def tag_replace(self, request: Request) -> Answer:
        project = await self._records.fetch(PROJECTS, request.params["id"])
        tags = list(dict.fromkeys((await request.json(schemas.TagsBody)).tags))
        await self._store_tags(project, tags)
        return json_answer({"tags": tags, "links": link(request, f"projects/{project.id}/tags")})

    async def tag_clear(self, request: Request) -> Answer:
        await self._store_tags(await self._records.fetch(PROJECTS, request.params["id"]), [])
        return empty_answer()

    async def tag_add(self, request: Request) -> Answer:
        project = await self._records.fetch(PROJECTS, request.params["id"])
        tags = convert([*tags_of(project), request.params["tag"]], schemas.Tags)
        await self._store_tags(project, list(dict.fromkeys(tags)))
        return empty_answer(201)

    async def tag_remove(self, request: Request) -> Answer:
        project = await self._records.fetch(PROJECTS, request.params["id"])
        tags = tags_of(project)
        if request.params["tag"] not in tags:
            raise NotFound("Could not find project tag.", kind="tag", id=request.params["tag"])
        await self._store_tags(project, [tag for tag in tags if tag != request.params["tag"]])
        return empty_answer()

    async def _store_tags(self, project: Project, tags: list[str]) -> None:
        await self._records.update(PROJECTS, project.id, {"tags": msgspec.json.encode(tags).decode()})

    # --- domains ----------------------------------------------------------------------------------------------------

    async def domain_list(self, request: Request) -> Answer:
        return await list_answer(self._identity, request, DOMAINS, "domains", domain_view, ("name", "enabled"))

    async def domain_create(self, request: Request) -> Answer:
        wanted = (await request.json(schemas.NewDomainBody)).domain
        domain = Domain(uuid4().hex, wanted.name, wanted.description or "", wanted.enabled)
        await self._records.insert(DOMAINS, domain)
        return json_answer({"domain": domain_view(request, domain)}, 201)

    async def domain_show(self, request: Request) -> Answer:
        context, domain_id = request.context, request.params["id"]
        if domain_id not in (context.domain_id, context.project_domain_id, context.user_domain_id):
            IDENTITY_POLICY.require(context, "identity:get_domain:other")
        return json_answer({"domain": domain_view(request, await self._records.fetch(DOMAINS, domain_id))})

    async def domain_update(self, request: Request) -> Answer:
        changes = (await request.json(schemas.ChangedDomainBody)).domain
        domain_id = request.params["id"]
        await self._records.fetch(DOMAINS, domain_id)
        if domain_id == DEFAULT_DOMAIN and changes.enabled is False:
            raise Forbidden("The default domain cannot be disabled: nobody could enable it again.")
        await self._records.update(DOMAINS, domain_id, given_columns(changes))
        return json_answer({"domain": domain_view(request, await self._records.fetch(DOMAINS, domain_id))})

    async def domain_delete(self, request: Request) -> Answer:
        domain = await self._records.fetch(DOMAINS, request.params["id"])
        if domain.id == DEFAULT_DOMAIN:
            raise Forbidden("The default domain cannot be deleted.")
        if domain.enabled:
            raise Forbidden("Cannot delete a domain that is enabled, please disable it first.")
        await self._records.domain_delete(domain.id)
        return empty_answer()

    # --- roles ------------------------------------------------------------------------------------------------------

    async def role_list(self, request: Request) -> Answer:
        return await list_answer(self._identity, request, ROLES, "roles", role_view, ("name",))

    async def role_create(self, request: Request) -> Answer:
        wanted = (await request.json(schemas.NewRoleBody)).role
        role = Role(uuid4().hex, wanted.name, wanted.description or "")
        await self._records.insert(ROLES, role)
        return json_answer({"role": role_view(request, role)}, 201)

    async def role_show(self, request: Request) -> Answer:
        role = await self._records.fetch(ROLES, request.params["id"])
        return json_answer({"role": role_view(request, role)})

    async def role_update(self, request: Request) -> Answer:
        changes = (await request.json(schemas.ChangedRoleBody)).role
        role = await self._records.fetch(ROLES, request.params["id"])
        if role.name in BUILT_IN and changes.name not in (UNSET, role.name):
            raise Forbidden(f"The built-in role {role.name} cannot be renamed: the policies name it.")
        await self._records.update(ROLES, role.id, given_columns(changes))
        return json_answer({"role": role_view(request, await self._records.fetch(ROLES, role.id))})

    async def role_delete(self, request: Request) -> Answer:
        role = await self._records.fetch(ROLES, request.params["id"])
        if role.name in BUILT_IN:
            raise Forbidden(f"The built-in role {role.name} cannot be deleted: the policies name it.")
        await self._records.delete(ROLES, role.id)
        return empty_answer()

    async def role_inferences(self, request: Request) -> Answer:
        roles = {role.name: role for role in await self._records.list(ROLES, {}, limit=ROLES_MAX)}
        inferences = [
            {"prior_role": role_view(request, roles[prior]), "implies": [role_view(request, roles[implied])]}
            for prior, implied in IMPLIES.items()
        ]
        return json_answer({"role_inferences": inferences, "links": link(request, "role_inferences")})
