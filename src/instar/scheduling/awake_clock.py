"""A clock that stands still while our own event loop does not turn: who did not listen cannot say that others were silent.

A process that was stopped, or that got no processor, finds the reports that came meanwhile only when it goes on, and may be
asked for the state of hosts before it has read them. Called by the host table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class AwakeClock:
    """`clock` in seconds, without the time that `run` was kept from waking. `tick_s`: how often it wakes."""

    def __init__(self, clock: Callable[[], float], *, tick_s: float) -> None:
        self._clock = clock
        self._tick_s = tick_s
        self._woke_at = clock()
        self._lost_s = 0.0

    def __call__(self) -> float:
        now = self._clock()
        return now - self._lost_s - self._late_s(now)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._tick_s)
            now = self._clock()
            self._lost_s += self._late_s(now)
            self._woke_at = now

    def _late_s(self, now: float) -> float:
        """A tick that comes a little late says nothing: only what is beyond a second one counts."""
        return max(0.0, now - self._woke_at - 2 * self._tick_s)
