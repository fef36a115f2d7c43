"""Users and groups."""

from __future__ import annotations

from uuid import uuid4

from msgspec import UNSET

from instar.errors import BadRequest, Forbidden, NotFound, Unauthorized
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.paging import Page
from instar.http.request import Request
from instar.http.routing import Route
from instar.identity import schemas
from instar.identity.bootstrap import set_password
from instar.identity.listing import callers_domain, given_columns, list_answer
from instar.identity.local import LocalIdentity
from instar.identity.policy import require_self_or
from instar.identity.views import group_view, page_view, project_view, user_view
from instar.store.identity import DOMAINS, GROUPS, PROJECTS, USERS, Group, User


class UserRoutes:
    def __init__(self, identity: LocalIdentity) -> None:
        self._identity = identity
        self._records = identity.records
        self._list_max = identity.settings.api.list_limit_max

    def routes(self) -> list[Route]:
        member = "/v3/groups/{id}/users/{user_id}"
        return [
            Route("GET", "/v3/users", "identity:list_users", self.user_list),
            Route("POST", "/v3/users", "identity:create_user", self.user_create),
            Route("GET", "/v3/users/{id}", "identity:get_user", self.user_show),
            Route("PATCH", "/v3/users/{id}", "identity:update_user", self.user_update),
            Route("DELETE", "/v3/users/{id}", "identity:delete_user", self.user_delete),
            Route("POST", "/v3/users/{id}/password", "identity:change_password", self.password_change),
            Route("GET", "/v3/users/{id}/projects", "identity:list_user_projects", self.user_projects),
            Route("GET", "/v3/users/{id}/groups", "identity:list_groups_for_user", self.user_groups),
            Route("GET", "/v3/groups", "identity:list_groups", self.group_list),
            Route("POST", "/v3/groups", "identity:create_group", self.group_create),
            Route("GET", "/v3/groups/{id}", "identity:get_group", self.group_show),
            Route("PATCH", "/v3/groups/{id}", "identity:update_group", self.group_update),
            Route("DELETE", "/v3/groups/{id}", "identity:delete_group", self.group_delete),
            Route("GET", "/v3/groups/{id}/users", "identity:list_users_in_group", self.member_list),
            Route("GET", member, "identity:check_user_in_group", self.member_check),
            Route("PUT", member, "identity:add_user_to_group", self.member_add),
            Route("DELETE", member, "identity:remove_user_from_group", self.member_remove),
        ]

    # --- users ------------------------------------------------------------------------------------------------------

    async def user_list(self, request: Request) -> Answer:
        filters = ("name", "domain_id", "enabled")
        return await list_answer(self._identity, request, USERS, "users", user_view, filters)

    async def user_create(self, request: Request) -> Answer:
        wanted = (await request.json(schemas.NewUserBody)).user
        domain = await self._records.fetch(DOMAINS, wanted.domain_id or callers_domain(request.context))
        if wanted.default_project_id is not None:
            await self._records.fetch(PROJECTS, wanted.default_project_id)
        user = User(
            id=uuid4().hex,
            domain_id=domain.id,
            name=wanted.name,
            description=wanted.description or "",
            email=wanted.email,
            enabled=wanted.enabled,
            default_project_id=wanted.default_project_id,
            password_hash=None if wanted.password is None else await self._identity.passwords.hash(wanted.password),
        )
        await self._records.insert(USERS, user)
        return json_answer({"user": user_view(request, user)}, 201)

    async def user_show(self, request: Request) -> Answer:
        require_self_or(request.context, request.params["id"], "identity:get_user")
        user = await self._records.fetch(USERS, request.params["id"])
        return json_answer({"user": user_view(request, user)})

    async def user_update(self, request: Request) -> Answer:
        changes = (await request.json(schemas.ChangedUserBody)).user
        user = await self._records.fetch(USERS, request.params["id"])
        _require_same_domain(changes.domain_id, user.domain_id)
        if isinstance(changes.default_project_id, str):
            await self._records.fetch(PROJECTS, changes.default_project_id)
        columns = given_columns(changes)
        if changes.password is not UNSET:
            columns["password_hash"] = await self._identity.passwords.hash(changes.password)
        refuse = "password_hash" in columns or changes.enabled is False
        await self._records.update(USERS, user.id, columns, refuse_tokens=refuse)
        return json_answer({"user": user_view(request, await self._records.fetch(USERS, user.id))})

    async def user_delete(self, request: Request) -> Answer:
        await self._records.delete(USERS, request.params["id"])
        return empty_answer()

    async def password_change(self, request: Request) -> Answer:
        """A user changes his own password. Every token that he has is refused afterwards, this one too."""
        if request.params["id"] != request.context.user_id:
            raise Forbidden(action="identity:change_password")
        wanted = (await request.json(schemas.PasswordChangeBody)).user
        user = await self._records.fetch(USERS, request.context.user_id)
        guesses = self._identity.guesses
        guesses.check(user.id, request.client_address)
        if not await self._identity.passwords.verify(user.password_hash, wanted.original_password):
            guesses.failed(user.id, request.client_address)
            raise Unauthorized()
        if wanted.password == wanted.original_password:
            raise BadRequest("The new password is the old one.")
        await set_password(self._identity, user.id, wanted.password)
        return empty_answer()

    async def user_projects(self, request: Request) -> Answer:
        user_id = request.params["id"]
        require_self_or(request.context, user_id, "identity:list_user_projects")
        await self._records.fetch(USERS, user_id)
        projects = await self._records.projects_of_user(user_id, limit=self._list_max)
        views = [project_view(request, project) for project in projects]
        return json_answer(page_view(request, "projects", views, self._one_page()))

    async def user_groups(self, request: Request) -> Answer:
        user_id = request.params["id"]
        require_self_or(request.context, user_id, "identity:list_groups_for_user")
        await self._records.fetch(USERS, user_id)
        groups = await self._records.groups_of_user(user_id, limit=self._list_max)
        views = [group_view(request, group) for group in groups]
        return json_answer(page_view(request, "groups", views, self._one_page()))

    def _one_page(self) -> Page:
        return Page(self._list_max + 1, None)

    # --- groups -----------------------------------------------------------------------------------------------------

    async def group_list(self, request: Request) -> Answer:
        return await list_answer(self._identity, request, GROUPS, "groups", group_view, ("name", "domain_id"))

    async def group_create(self, request: Request) -> Answer:
        wanted = (await request.json(schemas.NewGroupBody)).group
        domain = await self._records.fetch(DOMAINS, wanted.domain_id or callers_domain(request.context))
        group = Group(uuid4().hex, domain.id, wanted.name, wanted.description or "")
        await self._records.insert(GROUPS, group)
        return json_answer({"group": group_view(request, group)}, 201)

    async def group_show(self, request: Request) -> Answer:
        group = await self._records.fetch(GROUPS, request.params["id"])
        return json_answer({"group": group_view(request, group)})

    async def group_update(self, request: Request) -> Answer:
        changes = (await request.json(schemas.ChangedGroupBody)).group
        group = await self._records.fetch(GROUPS, request.params["id"])
        _require_same_domain(changes.domain_id, group.domain_id)
        await self._records.update(GROUPS, group.id, given_columns(changes))
        return json_answer({"group": group_view(request, await self._records.fetch(GROUPS, group.id))})

    async def group_delete(self, request: Request) -> Answer:
        await self._records.delete(GROUPS, request.params["id"])
        return empty_answer()

    async def member_list(self, request: Request) -> Answer:
        group = await self._records.fetch(GROUPS, request.params["id"])
        users = await self._records.group_members(group.id, limit=self._list_max)
        views = [user_view(request, user) for user in users]
        return json_answer(page_view(request, "users", views, self._one_page()))

    async def member_check(self, request: Request) -> Answer:
        group = await self._records.fetch(GROUPS, request.params["id"])
        user_id = request.params["user_id"]
        groups = await self._records.groups_of_user(user_id, limit=self._list_max)
        if group.id not in {one.id for one in groups}:
            raise NotFound("The user is not in the group.", kind="user", id=user_id)
        return empty_answer()

    async def member_add(self, request: Request) -> Answer:
        group = await self._records.fetch(GROUPS, request.params["id"])
        user = await self._records.fetch(USERS, request.params["user_id"])
        await self._records.group_member_add(group.id, user.id)
        return empty_answer()

    async def member_remove(self, request: Request) -> Answer:
        await self._records.group_member_remove(request.params["id"], request.params["user_id"])
        return empty_answer()


def _require_same_domain(wanted: object, domain_id: str) -> None:
    if wanted is not UNSET and wanted != domain_id:
        raise BadRequest("Cannot change Domain ID.")
