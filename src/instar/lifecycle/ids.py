"""Ids that operations give to what they make, chosen in a step of its own: the same after a crash."""

from __future__ import annotations

import uuid


async def new_id() -> str:
    return str(uuid.uuid4())
