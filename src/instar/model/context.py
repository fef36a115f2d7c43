"""Who asks: the verified identity behind a request, and the ids that follow it through logs and journals."""

from __future__ import annotations

import msgspec


class RequestContext(msgspec.Struct, frozen=True):
    """Made by the HTTP room from a verified token. `request_id` is `req-<uuid>`.

    `roles` are names with their implied ones (admin implies manager, manager member, member reader). `project_id` is
    empty where the token has another scope: `domain_id` for a domain, `is_system` for the whole cloud, neither for
    none. `global_request_id` is the id that the caller gave to follow a request through services; empty when none."""

    request_id: str
    user_id: str
    user_name: str
    project_id: str
    project_name: str
    roles: frozenset[str]
    user_domain_id: str = "default"
    project_domain_id: str = "default"
    domain_id: str = ""
    is_system: bool = False
    global_request_id: str = ""

    @property
    def is_admin(self) -> bool:
        return "admin" in self.roles


class Authenticated(msgspec.Struct, frozen=True):
    """What a valid token says. `roles` are names, implied ones included; `project_id` is empty where the scope is
    another: `domain_id` for a domain, `is_system` for the whole cloud, none of them for an unscoped token."""

    user_id: str
    user_name: str
    user_domain_id: str
    project_id: str
    project_name: str
    project_domain_id: str
    roles: frozenset[str]
    expires_at: float  # seconds since the epoch
    domain_id: str = ""
    is_system: bool = False
