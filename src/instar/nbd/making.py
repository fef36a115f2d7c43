"""Processes that are made in a thread, by somebody who may be cancelled meanwhile. Used by who keeps relays and exports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(make: Callable[[], T]) -> T:
    """The result of `make`, in a thread, for which also a caller that is cancelled waits: whoever ends the process next has
    to find it made."""
    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        await asyncio.wait([making])
        if not making.cancelled():
            making.exception()  # told nobody: whoever waited has given up
        raise
