"""Which host the reconciler looks at next: those at once of which something is new, the others in their turn.

A look costs a command to the host and reads of the database. Thousands of hosts at once (at the start of a conductor, or
when their minute is over) would keep operations waiting, so those of which nothing is new are looked at no faster than a
setting says.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

AT_ONCE = 64  # so many are looked at without a pause after a while without: a small cloud never waits


class HostLooks:
    """Hosts that wait, each of them once, and none that is being looked at: one that reports often would have all who look.
    `per_s`: hosts in a second of which nothing is new."""

    def __init__(self, per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._clock = clock
        self._new: dict[str, None] = {}
        self._in_turn: dict[str, None] = {}
        self._looked_at: set[str] = set()
        self._again: dict[str, bool] = {}  # put while it was looked at → whether something is new
        self._more = asyncio.Event()
        self._one_waits = asyncio.Lock()  # of many who want the next one
        self._credit = float(AT_ONCE)
        self._counted_at = clock()

    def put(self, host: str, *, new: bool) -> None:
        """The host is to be looked at; `new`: before all that only wait for their turn."""
        if host in self._looked_at:
            self._again[host] = new or self._again.get(host, False)
        elif new:
            self._in_turn.pop(host, None)
            self._new[host] = None
        elif host not in self._new:
            self._in_turn[host] = None
        self._more.set()

    async def next(self) -> str:
        """The host that is to be looked at now, until `done`. What is new from here on is another look."""
        async with self._one_waits:
            while True:
                if self._new:
                    return self._taken(self._new)
                wait_s = self._wait_s() if self._in_turn else None
                if wait_s == 0:
                    self._credit -= 1
                    return self._taken(self._in_turn)
                self._more.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._more.wait()

    def done(self, host: str) -> None:
        """The look has ended."""
        self._looked_at.discard(host)
        if host in self._again:
            self.put(host, new=self._again.pop(host))

    def _taken(self, hosts: dict[str, None]) -> str:
        host = next(iter(hosts))
        del hosts[host]
        self._looked_at.add(host)
        return host

    def _wait_s(self) -> float:
        """Until one more may be looked at."""
        now = self._clock()
        self._credit = min(float(AT_ONCE), self._credit + (now - self._counted_at) * self._per_s)
        self._counted_at = now
        return 0 if self._credit >= 1 else (1 - self._credit) / self._per_s
