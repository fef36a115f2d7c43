"""Application credentials: a secret of a user for one project, with some of his roles, for programs."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from uuid import uuid4

import msgspec

from instar.errors import BadRequest, Forbidden, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.identity import schemas
from instar.identity.local import ROLES_MAX, LocalIdentity, Standing
from instar.identity.policy import require_self_or
from instar.identity.views import application_credential_view
from instar.store.identity import APPLICATION_CREDENTIALS, ROLES, ApplicationCredential, Role

SECRET_BYTES = 48
PER_USER_MAX = 100


class CredentialRoutes:
    def __init__(self, identity: LocalIdentity) -> None:
        self._identity = identity
        self._records = identity.records

    def routes(self) -> list[Route]:
        path = "/v3/users/{user_id}/application_credentials"
        name = "identity:{}_application_credential"
        return [
            Route("GET", path, name.format("list") + "s", self.credential_list),
            Route("POST", path, name.format("create"), self.credential_create),
            Route("GET", path + "/{id}", name.format("get"), self.credential_show),
            Route("DELETE", path + "/{id}", name.format("delete"), self.credential_delete),
        ]

    async def credential_list(self, request: Request) -> Answer:
        user_id = request.params["user_id"]
        require_self_or(request.context, user_id, "identity:list_application_credentials")
        equals = {"user_id": user_id}
        name = request.query_one("name")
        if name is not None:
            equals["name"] = name
        found = await self._records.list(APPLICATION_CREDENTIALS, equals, limit=PER_USER_MAX)
        roles = await self._roles()
        views = [application_credential_view(request, one, roles) for one in found]
        links = {"self": f"{request.origin}{request.path}", "previous": None, "next": None}
        return json_answer({"application_credentials": views, "links": links})

    async def credential_create(self, request: Request) -> Answer:
        """The secret is in this answer and never again: only its hash is kept."""
        if request.params["user_id"] != request.context.user_id:
            raise Forbidden(action="identity:create_application_credential")
        wanted = (await request.json(schemas.NewApplicationCredentialBody)).application_credential
        standing = await self._identity.verify(request.header(b"x-auth-token"))
        _require_unrestricted(standing)
        if standing.project is None or wanted.project_id not in (None, standing.project.id):
            raise Forbidden("An application credential is for the project that the token is scoped to.")
        known = await self._records.list(
            APPLICATION_CREDENTIALS, {"user_id": standing.user.id}, limit=PER_USER_MAX
        )
        if len(known) >= PER_USER_MAX:
            raise Forbidden(f"A user may have {PER_USER_MAX} application credentials.")
        secret = secrets.token_urlsafe(SECRET_BYTES) if wanted.secret is None else wanted.secret
        credential = ApplicationCredential(
            id=uuid4().hex,
            user_id=standing.user.id,
            project_id=standing.project.id,
            name=wanted.name,
            description=wanted.description or "",
            secret_hash=await self._identity.passwords.hash(secret),
            role_ids=msgspec.json.encode(_chosen_roles(standing, wanted.roles)).decode(),
            expires_at=_expiry(wanted.expires_at, self._identity.clock()),
            unrestricted=wanted.unrestricted,
        )
        await self._records.insert(APPLICATION_CREDENTIALS, credential)
        view = application_credential_view(request, credential, await self._roles())
        return json_answer({"application_credential": {**view, "secret": secret}}, 201)

    async def credential_show(self, request: Request) -> Answer:
        credential = await self._found(request, "identity:get_application_credential")
        view = application_credential_view(request, credential, await self._roles())
        return json_answer({"application_credential": view})

    async def credential_delete(self, request: Request) -> Answer:
        credential = await self._found(request, "identity:delete_application_credential")
        _require_unrestricted(await self._identity.verify(request.header(b"x-auth-token")))
        await self._records.delete(APPLICATION_CREDENTIALS, credential.id)
        return empty_answer()

    async def _found(self, request: Request, rule: str) -> ApplicationCredential:
        require_self_or(request.context, request.params["user_id"], rule)
        credential = await self._records.fetch(APPLICATION_CREDENTIALS, request.params["id"])
        if credential.user_id != request.params["user_id"]:
            raise NotFound("Could not find application credential.", kind="application credential", id=credential.id)
        return credential

    async def _roles(self) -> list[Role]:
        return await self._records.list(ROLES, {}, limit=ROLES_MAX)


def _require_unrestricted(standing: Standing) -> None:
    """A credential must not make or delete others, unless it was made for that."""
    credential = standing.application_credential
    if credential is not None and not credential.unrestricted:
        raise Forbidden("A restricted application credential cannot change application credentials.")


def _chosen_roles(standing: Standing, wanted: list[schemas.RoleReference] | None) -> list[str]:
    if not wanted:
        return [role.id for role in standing.roles]
    chosen: list[str] = []
    for reference in wanted:
        if reference.id is None and reference.name is None:
            raise BadRequest("Invalid input: a role is named by id or by name - at `$.application_credential.roles`.")
        found = [role.id for role in standing.roles if reference.id == role.id or reference.name == role.name]
        if not found:
            raise BadRequest(f"The token does not have the role {reference.id or reference.name}.")
        chosen += found
    return list(dict.fromkeys(chosen))


def _expiry(text: str | None, now: float) -> int | None:
    """Microseconds since the epoch. Raises BadRequest for what is no time, or a time in the past."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadRequest("Invalid input: not an ISO 8601 time - at `$.application_credential.expires_at`.") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    if moment.timestamp() <= now:
        raise BadRequest("Invalid input: the time is in the past - at `$.application_credential.expires_at`.")
    return int(moment.timestamp() * 1_000_000)
