"""The first start: domain, projects, roles and the first two users. Called by the program, once in a cloud's life."""

from __future__ import annotations

import secrets
from uuid import uuid4

import msgspec

from instar.errors import Conflict
from instar.identity.local import LocalIdentity
from instar.identity.roles import BUILT_IN
from instar.store.identity import (
    DOMAINS,
    PROJECTS,
    ROLES,
    USERS,
    Assignment,
    Domain,
    Project,
    Role,
    User,
    assignment_statement,
    insert_statement,
)

DEFAULT_DOMAIN = "default"
PASSWORD_BYTES = 18


class FirstCredentials(msgspec.Struct, frozen=True):
    """What only the first start knows: write it where its owner alone reads it. Log in by `default` domain."""

    admin_password: str
    demo_password: str
    admin_project_id: str
    demo_project_id: str
    service_project_id: str
    admin_user_id: str
    demo_user_id: str


def new_password() -> str:
    return secrets.token_urlsafe(PASSWORD_BYTES)


async def is_bootstrapped(identity: LocalIdentity) -> bool:
    return bool(await identity.records.list(DOMAINS, {"id": DEFAULT_DOMAIN}, limit=1))


async def bootstrap(
    identity: LocalIdentity, *, admin_password: str | None = None, demo_password: str | None = None
) -> FirstCredentials | None:
    """Makes domain `default`, projects admin, demo and service, the roles, users admin (admin on project admin and on
    the system) and demo (member of project demo), all in one transaction. Does nothing and returns None when done before,
    also by another process at the same moment.

    Give the passwords to have written them down before this commits; those that are not given are made."""
    if await is_bootstrapped(identity):
        return None
    first = FirstCredentials(
        admin_password=admin_password or new_password(),
        demo_password=demo_password or new_password(),
        admin_project_id=uuid4().hex,
        demo_project_id=uuid4().hex,
        service_project_id=uuid4().hex,
        admin_user_id=uuid4().hex,
        demo_user_id=uuid4().hex,
    )
    roles = {name: Role(uuid4().hex, name, f"Built-in role {name}") for name in BUILT_IN}
    projects = (
        Project(first.admin_project_id, DEFAULT_DOMAIN, "admin", "Of the operators of this cloud"),
        Project(first.demo_project_id, DEFAULT_DOMAIN, "demo", "To try things out"),
        Project(first.service_project_id, DEFAULT_DOMAIN, "service", "Of services that work for this cloud"),
    )
    users = (
        User(
            first.admin_user_id, DEFAULT_DOMAIN, "admin", default_project_id=first.admin_project_id,
            password_hash=await identity.passwords.hash(first.admin_password),
        ),
        User(
            first.demo_user_id, DEFAULT_DOMAIN, "demo", default_project_id=first.demo_project_id,
            password_hash=await identity.passwords.hash(first.demo_password),
        ),
    )  # fmt: skip
    assignments = (
        Assignment("user", first.admin_user_id, "project", first.admin_project_id, roles["admin"].id),
        Assignment("user", first.admin_user_id, "system", "all", roles["admin"].id),
        Assignment("user", first.demo_user_id, "project", first.demo_project_id, roles["member"].id),
    )
    statements = (
        insert_statement(DOMAINS, Domain(DEFAULT_DOMAIN, "Default", "The first domain")),
        *(insert_statement(ROLES, role) for role in roles.values()),
        *(insert_statement(PROJECTS, project) for project in projects),
        *(insert_statement(USERS, user) for user in users),
        *(assignment_statement(assignment) for assignment in assignments),
    )
    try:
        await identity.records.write(*statements)
    except Conflict:
        if await is_bootstrapped(identity):
            return None
        raise
    return first


async def set_password(identity: LocalIdentity, user_id: str, password: str) -> None:
    """A new password; every token of the user is refused from now on. Raises BadRequest, NotFound."""
    hashed = await identity.passwords.hash(password)
    await identity.records.update(USERS, user_id, {"password_hash": hashed}, refuse_tokens=True)
