"""What the other rooms need of identity. Implemented by `local.py`; a real Keystone will be another implementation."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Authenticated(msgspec.Struct, frozen=True):
    """What a valid token says. `roles` are names, implied ones included; `project_id` is empty for an unscoped token."""

    user_id: str
    user_name: str
    user_domain_id: str
    project_id: str
    project_name: str
    project_domain_id: str
    roles: frozenset[str]
    expires_at: float  # seconds since the epoch


class IdentityService(Protocol):
    async def authenticate_token(self, token: str) -> Authenticated:
        """Raises Unauthorized for a token that is forged, expired or revoked, or whose user or project is disabled."""
        ...

    async def project_exists(self, project_id: str) -> bool: ...
