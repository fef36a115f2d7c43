"""Who asks: the verified identity behind a request, and the ids that follow it through logs and journals."""

from __future__ import annotations

import msgspec


class RequestContext(msgspec.Struct, frozen=True):
    """Made by the authentication middleware from a verified token. `request_id` is `req-<uuid>`.

    `roles` are names with their implied ones (admin implies manager, manager member, member reader)."""

    request_id: str
    user_id: str
    user_name: str
    project_id: str
    project_name: str
    roles: frozenset[str]
    user_domain_id: str = "default"
    project_domain_id: str = "default"

    @property
    def is_admin(self) -> bool:
        return "admin" in self.roles
