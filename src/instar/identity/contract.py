"""What the other rooms need of identity. Implemented by `local.py`; a real Keystone will be another implementation."""

from __future__ import annotations

from typing import Protocol

from instar.model.context import Authenticated

__all__ = ["Authenticated", "IdentityService"]


class IdentityService(Protocol):
    async def authenticate_token(self, token: str) -> Authenticated:
        """Raises Unauthorized for a token that is forged, expired or revoked, or whose user or project is disabled.

        Called for every request: implementations remember what they verified, for a bounded time and number."""
        ...

    async def project_exists(self, project_id: str) -> bool: ...
