"""Logging in: methods (password, token, application credential) and the scope that is asked for → a token.

Every refusal is the same Unauthorized: what was wrong is not for a guesser to know. Called by `auth_routes`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from instar.errors import BadRequest, Forbidden, NotFound, Unauthorized
from instar.identity.local import LocalIdentity, Standing
from instar.identity.schemas import (
    ApplicationCredentialMethod,
    Auth,
    ProjectReference,
    Reference,
    Scope,
    UserReference,
)
from instar.identity.tokens import Claims, new_token_id
from instar.store.identity import (
    APPLICATION_CREDENTIALS,
    DOMAINS,
    PROJECTS,
    USERS,
    ApplicationCredential,
    Domain,
    Project,
    User,
)


class _Proof(NamedTuple):
    """What the methods have shown: who it is, and what limits the token to come."""

    user: User
    methods: tuple[str, ...]
    expires_at: int | None = None  # seconds; a token that was traded in keeps its end
    credential: ApplicationCredential | None = None


async def log_in(identity: LocalIdentity, auth: Auth, address: str) -> tuple[str, Standing]:
    """The token and what it means. Raises Unauthorized, Forbidden, BadRequest, TooManyRequests."""
    proof: _Proof | None = None
    for method in dict.fromkeys(auth.identity.methods):
        shown = await _prove(identity, auth, method, address)
        if proof is not None and shown.user.id != proof.user.id:
            raise Unauthorized()
        proof = _both(proof, shown)
    assert proof is not None
    claims = await _claims(identity, proof)
    standing = await _scoped(identity, claims, proof, auth.scope)
    return identity.signer.sign(standing.claims), standing


def _both(one: _Proof | None, other: _Proof) -> _Proof:
    if one is None:
        return other
    ends = [proof.expires_at for proof in (one, other) if proof.expires_at is not None]
    methods = tuple(dict.fromkeys(one.methods + other.methods))
    return _Proof(one.user, methods, min(ends, default=None), one.credential or other.credential)


async def _prove(identity: LocalIdentity, auth: Auth, method: str, address: str) -> _Proof:
    given = auth.identity
    if method == "password" and given.password is not None:
        return await _by_password(identity, given.password.user, address)
    if method == "token" and given.token is not None:
        return await _by_token(identity, given.token.id)
    if method == "application_credential" and given.application_credential is not None:
        if auth.scope is not None:
            raise Unauthorized("Application credentials cannot request a scope.")
        return await _by_credential(identity, given.application_credential, address)
    if method in ("password", "token", "application_credential"):
        raise BadRequest(f"Invalid input: Object missing required field `{method}` - at `$.auth.identity`.")
    raise Unauthorized("Attempted to authenticate with an unsupported method.")


async def _by_password(identity: LocalIdentity, reference: UserReference, address: str) -> _Proof:
    if reference.password is None:
        raise BadRequest("Invalid input: Object missing required field `password` - at `$.auth.identity.password.user`.")
    guessed = _guessed(reference)
    identity.guesses.check(guessed, address)
    user = await _find_user(identity, reference)
    if not await identity.passwords.verify(user.password_hash if user else None, reference.password) or user is None:
        identity.guesses.failed(guessed, address)
        raise Unauthorized()
    identity.guesses.succeeded(guessed, address)
    return _Proof(user, ("password",))


async def _by_token(identity: LocalIdentity, token: str) -> _Proof:
    standing = await identity.verify(token)
    if standing.application_credential is not None:
        raise Forbidden("A token of an application credential cannot be traded in for another one.")
    methods = dict.fromkeys(["token", *standing.claims.methods])
    return _Proof(standing.user, tuple(methods), standing.claims.exp)


async def _by_credential(identity: LocalIdentity, given: ApplicationCredentialMethod, address: str) -> _Proof:
    guessed = f"credential {given.id}" if given.id else f"credential {given.name} {_guessed(given.user)}"
    identity.guesses.check(guessed, address)
    credential = await _find_credential(identity, given)
    matches = await identity.passwords.verify(credential.secret_hash if credential else None, given.secret)
    if not matches or credential is None:
        identity.guesses.failed(guessed, address)
        raise Unauthorized()
    identity.guesses.succeeded(guessed, address)
    try:
        user = await identity.records.fetch(USERS, credential.user_id)
    except NotFound as error:
        raise Unauthorized() from error
    ends = credential.expires_at // 1_000_000 if credential.expires_at is not None else None
    return _Proof(user, ("application_credential",), ends, credential)


def _guessed(reference: UserReference | None) -> str:
    """Names a user for the count of wrong guesses, whether he exists or not."""
    if reference is None:
        return ""
    domain = reference.domain or Reference()
    return f"{reference.id or ''}/{reference.name or ''}/{domain.id or ''}/{domain.name or ''}"


async def _find_user(identity: LocalIdentity, reference: UserReference) -> User | None:
    if reference.id is not None:
        found = await identity.records.list(USERS, {"id": reference.id}, limit=1)
    else:
        if reference.name is None or reference.domain is None:
            raise BadRequest("Invalid input: a user is named by id, or by name and domain - at `$.auth.identity`.")
        domain = await _find_domain(identity, reference.domain)
        domain_id = domain.id if domain else ""  # asked all the same: an unknown domain takes as long as a known one
        found = await identity.records.list(USERS, {"name": reference.name, "domain_id": domain_id}, limit=1)
    return found[0] if found else None


async def _find_domain(identity: LocalIdentity, reference: Reference) -> Domain | None:
    if reference.id is not None:
        found = await identity.records.list(DOMAINS, {"id": reference.id}, limit=1)
    elif reference.name is not None:
        found = await identity.records.list(DOMAINS, {"name": reference.name}, limit=1)
    else:
        raise BadRequest("Invalid input: a domain is named by id or by name - at `$.auth`.")
    return found[0] if found else None


async def _find_project(identity: LocalIdentity, reference: ProjectReference) -> Project | None:
    if reference.id is not None:
        found = await identity.records.list(PROJECTS, {"id": reference.id}, limit=1)
        return found[0] if found else None
    if reference.name is None or reference.domain is None:
        raise BadRequest("Invalid input: a project is named by id, or by name and domain - at `$.auth.scope`.")
    domain = await _find_domain(identity, reference.domain)
    if domain is None:
        return None
    found = await identity.records.list(PROJECTS, {"name": reference.name, "domain_id": domain.id}, limit=1)
    return found[0] if found else None


async def _find_credential(
    identity: LocalIdentity, given: ApplicationCredentialMethod
) -> ApplicationCredential | None:
    if given.id is not None:
        found = await identity.records.list(APPLICATION_CREDENTIALS, {"id": given.id}, limit=1)
        return found[0] if found else None
    if given.name is None or given.user is None:
        raise BadRequest("Invalid input: an application credential is named by id, or by name and user - at `$.auth`.")
    user = await _find_user(identity, given.user)
    if user is None:
        return None
    found = await identity.records.list(
        APPLICATION_CREDENTIALS, {"name": given.name, "user_id": user.id}, limit=1
    )
    return found[0] if found else None


async def _claims(identity: LocalIdentity, proof: _Proof) -> Claims:
    now = int(identity.clock())
    ends = now + identity.settings.identity.token_lifetime_s
    return Claims(
        sub=proof.user.id,
        jti=new_token_id(),
        iat=now,
        exp=min(ends, proof.expires_at) if proof.expires_at is not None else ends,
        epoch=proof.user.token_epoch,
        methods=list(proof.methods),
    )


async def _scoped(identity: LocalIdentity, claims: Claims, proof: _Proof, scope: Scope | str | None) -> Standing:
    if proof.credential is not None:
        project = await identity.records.fetch(PROJECTS, proof.credential.project_id)
        limited = msgspec.structs.replace(claims, application_credential=proof.credential.id)
        return await identity.stand(_in_project(limited, project))
    if isinstance(scope, str):
        if scope != "unscoped":
            raise BadRequest("Invalid input: the scope is an object or `unscoped` - at `$.auth.scope`.")
        return await identity.stand(claims)
    if scope is None:
        return await _by_default(identity, claims, proof.user)
    if sum(part is not None for part in (scope.project, scope.domain, scope.system, scope.unscoped)) != 1:
        raise BadRequest("Invalid input: one of project, domain, system, unscoped is needed - at `$.auth.scope`.")
    if scope.project is not None:
        wanted = await _find_project(identity, scope.project)
        if wanted is None:
            raise Unauthorized()
        return await identity.stand(_in_project(claims, wanted))
    if scope.domain is not None:
        domain = await _find_domain(identity, scope.domain)
        if domain is None:
            raise Unauthorized()
        return await identity.stand(msgspec.structs.replace(claims, domain=domain.id))
    if scope.system is not None:
        return await identity.stand(msgspec.structs.replace(claims, system=True))
    return await identity.stand(claims)


def _in_project(claims: Claims, project: Project) -> Claims:
    return msgspec.structs.replace(claims, project=project.id, project_epoch=project.token_epoch)


async def _by_default(identity: LocalIdentity, claims: Claims, user: User) -> Standing:
    """No scope was asked for: the user's default project where he may use it, else none."""
    if user.default_project_id:
        project = await _find_project(identity, ProjectReference(id=user.default_project_id))
        if project is not None:
            try:
                return await identity.stand(_in_project(claims, project))
            except Unauthorized:
                pass
    return await identity.stand(claims)
