"""A conductor's lease: its right to act, for as long as it shows in time that it lives.

It is a row in the database. Others may remove it when its beat stood still for the lease's time, by their own clocks; its
holder counts from before its last beat, and less, so it knows earlier than they that it may have lost it. One that was only
slow, or stopped for a while, asks the database before it does anything else.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextvars import ContextVar

from instar.errors import LeaseLost
from instar.store.conductors import conductor_beat, conductor_register, conductors_evict_others
from instar.store.contract import Store, WriteConflict

MARGIN = 1 / 6  # of the lease's time: so much earlier its holder does not trust it any more
Clock = Callable[[], float]


def clock_of_life() -> float:
    """Seconds that pass also while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """One registration of a conductor, under an id of its own. Once lost it is lost for good: `lost` is set."""

    def __init__(self, store: Store, lease_s: float, *, clock: Clock = clock_of_life) -> None:
        self.id = f"conductor-{os.urandom(4).hex()}"
        self.lost = asyncio.Event()
        self._store = store
        self._trusted_s = lease_s * (1 - MARGIN)
        self._clock = clock
        self._shown_at = float("-inf")
        self._showing = asyncio.Lock()

    async def acquire(self, *, alone: bool) -> None:
        """Register. `alone`: all that is registered besides is dead."""
        shown_at = self._clock()
        others = (conductors_evict_others(self.id),) if alone else ()
        await self._store.write(conductor_register(self.id), *others)
        self._shown_at = shown_at

    @property
    def held(self) -> bool:
        """Nobody can have taken it away yet, by this process's own clock."""
        return not self.lost.is_set() and self._clock() - self._shown_at < self._trusted_s

    async def renew(self) -> None:
        """Show life. Raises LeaseLost when somebody took it away, Unavailable when the database is away."""
        async with self._showing:
            await self._show()

    async def ensure(self) -> None:
        """Before anything that others can see: returns at once while it is held, else asks. Raises what `renew` raises."""
        if self.held:
            return
        async with self._showing:
            if not self.held:  # of many that wait here after a pause, the first one asks for all
                await self._show()

    async def _show(self) -> None:
        shown_at = self._clock()
        if self.lost.is_set():
            raise LeaseLost(id=self.id)
        try:
            await self._store.write(conductor_beat(self.id))
        except WriteConflict:
            self.lost.set()
            raise LeaseLost(id=self.id) from None
        self._shown_at = shown_at


class Mandate:
    """What a task acts by. `over`: its work has ended; what it has begun and nobody waits for acts by nothing any more."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.over = False


_acting: ContextVar[Mandate | None] = ContextVar("mandate", default=None)


def act_under(lease: Lease) -> Mandate:
    """From now on this task, and those that it begins, act by this lease: until `over` is set, if ever."""
    mandate = Mandate(lease)
    _acting.set(mandate)
    return mandate


async def ensure_lease() -> None:
    """The lease that this task acts by is held, if it acts by one. Raises LeaseLost, Unavailable."""
    mandate = _acting.get()
    if mandate is not None and not mandate.over:
        await mandate.lease.ensure()
