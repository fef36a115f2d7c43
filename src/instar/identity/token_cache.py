"""Verified tokens, remembered for a moment. What was looked up before a change is never stored after it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from instar.identity.contract import Authenticated

TOKENS_MAX = 4096


class TokenCache:
    """token → Authenticated, the least recently used dropped first.

    `ttl_s`: how long a change of another process may go unseen whose word of it was lost; others show at once."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.time) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, Authenticated]] = OrderedDict()
        self._generation = 0

    def get(self, token: str) -> Authenticated | None:
        entry = self._entries.get(token)
        if entry is None:
            return None
        now = self._clock()
        stored_at, who = entry
        # A clock that was set back must not keep anything alive.
        if not stored_at <= now < stored_at + self._ttl_s or now >= who.expires_at:
            del self._entries[token]
            return None
        self._entries.move_to_end(token)
        return who

    @property
    def generation(self) -> int:
        """Read it before the lookup, give it to `put`."""
        return self._generation

    def put(self, token: str, who: Authenticated, generation: int) -> None:
        if generation != self._generation:
            return
        self._entries[token] = (self._clock(), who)
        if len(self._entries) > TOKENS_MAX:
            self._entries.popitem(last=False)

    def forget(self) -> None:
        """Something changed that tokens depend on: all of them are looked up again."""
        self._generation += 1
        self._entries.clear()
