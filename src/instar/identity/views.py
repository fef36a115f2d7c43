"""How records look in answers. Hashes and epochs never leave this room."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from instar.http.paging import Page, next_url
from instar.http.request import Request
from instar.identity.local import Standing
from instar.store.identity import ApplicationCredential, Domain, Group, Project, Role, User


def time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def link(request: Request, path: str) -> dict[str, str]:
    return {"self": f"{request.base_url}/v3/{path}"}


def user_view(request: Request, user: User) -> dict[str, Any]:
    view: dict[str, Any] = {
        "id": user.id,
        "name": user.name,
        "domain_id": user.domain_id,
        "enabled": user.enabled,
        "description": user.description,
        "password_expires_at": None,
        "options": {},
        "links": link(request, f"users/{user.id}"),
    }
    if user.email is not None:
        view["email"] = user.email
    if user.default_project_id is not None:
        view["default_project_id"] = user.default_project_id
    return view


def project_view(request: Request, project: Project) -> dict[str, Any]:
    return {
        "id": project.id,
        "name": project.name,
        "domain_id": project.domain_id,
        "parent_id": project.domain_id,
        "is_domain": False,
        "enabled": project.enabled,
        "description": project.description,
        "tags": tags_of(project),
        "options": {},
        "links": link(request, f"projects/{project.id}"),
    }


def tags_of(project: Project) -> list[str]:
    return msgspec.json.decode(project.tags, type=list[str])


def domain_view(request: Request, domain: Domain) -> dict[str, Any]:
    return {
        "id": domain.id,
        "name": domain.name,
        "enabled": domain.enabled,
        "description": domain.description,
        "tags": [],
        "options": {},
        "links": link(request, f"domains/{domain.id}"),
    }


def group_view(request: Request, group: Group) -> dict[str, Any]:
    return {
        "id": group.id,
        "name": group.name,
        "domain_id": group.domain_id,
        "description": group.description,
        "links": link(request, f"groups/{group.id}"),
    }


def role_view(request: Request, role: Role) -> dict[str, Any]:
    return {
        "id": role.id,
        "name": role.name,
        "domain_id": None,
        "description": role.description,
        "options": {},
        "links": link(request, f"roles/{role.id}"),
    }


def application_credential_view(
    request: Request, credential: ApplicationCredential, roles: Sequence[Role]
) -> dict[str, Any]:
    expires_at = None if credential.expires_at is None else time_text(credential.expires_at / 1_000_000)
    given = set(msgspec.json.decode(credential.role_ids, type=list[str]))
    return {
        "id": credential.id,
        "name": credential.name,
        "description": credential.description,
        "project_id": credential.project_id,
        "user_id": credential.user_id,
        "roles": [{"id": role.id, "name": role.name, "domain_id": None} for role in roles if role.id in given],
        "expires_at": expires_at,
        "unrestricted": credential.unrestricted,
        "system": None,
        "links": link(request, f"users/{credential.user_id}/application_credentials/{credential.id}"),
    }


def token_view(standing: Standing, catalog: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The body of a token. `catalog` None: left out, as for unscoped tokens and `?nocatalog`."""
    claims, user = standing.claims, standing.user
    view: dict[str, Any] = {
        "methods": claims.methods,
        "user": {
            "id": user.id,
            "name": user.name,
            "domain": {"id": standing.user_domain.id, "name": standing.user_domain.name},
            "password_expires_at": None,
        },
        "audit_ids": [claims.jti],
        "issued_at": time_text(claims.iat),
        "expires_at": time_text(claims.exp),
    }
    if standing.project is not None and standing.project_domain is not None:
        domain = standing.project_domain
        view["project"] = {
            "id": standing.project.id,
            "name": standing.project.name,
            "domain": {"id": domain.id, "name": domain.name},
        }
        view["is_domain"] = False
    elif standing.domain is not None:
        view["domain"] = {"id": standing.domain.id, "name": standing.domain.name}
    elif claims.system:
        view["system"] = {"all": True}
    if standing.roles:
        view["roles"] = [{"id": role.id, "name": role.name} for role in standing.roles]
        if catalog is not None:
            view["catalog"] = catalog
    credential = standing.application_credential
    if credential is not None:
        view["application_credential"] = {
            "id": credential.id,
            "name": credential.name,
            "restricted": not credential.unrestricted,
        }
    return view


def page_view(request: Request, key: str, views: list[dict[str, Any]], page: Page) -> dict[str, Any]:
    """A list with its links; there is a next page when this one is full."""
    full = len(views) == page.limit and views
    return {
        key: views,
        "links": {
            "self": f"{request.origin}{request.path}",
            "previous": None,
            "next": next_url(request, views[-1]["id"]) if full else None,
        },
    }
