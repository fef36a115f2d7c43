"""What the other rooms need of identity. Implemented by `local.py`; a real Keystone will be another implementation."""

from __future__ import annotations

from typing import Protocol

import msgspec


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


class IdentityService(Protocol):
    async def authenticate_token(self, token: str) -> Authenticated:
        """Raises Unauthorized for a token that is forged, expired or revoked, or whose user or project is disabled.

        Called for every request: implementations remember what they verified, for a bounded time and number."""
        ...

    async def project_exists(self, project_id: str) -> bool: ...
