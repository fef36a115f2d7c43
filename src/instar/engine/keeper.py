"""The keeper: the one conductor that also does what must be done once for all of them.

Which one it is stands in the database, and holds as long as that conductor's own lease. Every write of what is kept carries
a guard on it, every command to a host asks for the lease first, and when the lease is not held any more by this process's
own clock, the work stops: before another can begin.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

import structlog

from instar.engine.conductor import Conductor
from instar.engine.lease import Lease, act_under
from instar.metrics import numbers
from instar.store.conductors import keeper_guard, keeper_leave, keeper_take
from instar.store.contract import Store
from instar.store.guard import guard_task

log = structlog.get_logger()

LOOKS_PER_LEASE = 12


class Kept(Protocol):
    """Work that one process does for all. It is opened and closed again and again in one process."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...


class Keeper:
    """Does `kept` while its conductor is the keeper. Open it before the conductor takes operations, or together with it."""

    def __init__(self, store: Store, conductor: Conductor, kept: Kept, *, lease_s: float) -> None:
        self._store = store
        self._conductor = conductor
        self._kept = kept
        self._look_s = lease_s / LOOKS_PER_LEASE
        self._lease: Lease | None = None  # of the time in which this is the keeper
        self._stopping: asyncio.Task[None] | None = None
        self._loop: asyncio.Task[None] | None = None
        conductor.before_leaving(self.close)

    @property
    def keeps(self) -> bool:
        """This process is the keeper now."""
        return self._lease is not None

    async def open(self) -> None:
        """Be the keeper, where nobody else is; then look again and again."""
        await self._conductor.join()
        await self._look()
        self._loop = asyncio.create_task(self._look_for_ever(), name="keeper")

    async def close(self) -> None:
        """Stop, and let another one begin."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None
        lease = self._lease
        await self._stop()
        if lease is not None:
            with contextlib.suppress(Exception):  # the database is away: the lease ends by itself
                await self._store.write(keeper_leave(lease.id))

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            try:
                await self._look()
            except Exception:
                log.exception("keeper.failed")

    async def _look(self) -> None:
        if self._lease is not None and not self._lease.held:
            log.warning("keeper.stops", conductor=self._lease.id)
            numbers.lease_changed("keeper_lost")
            await self._stop()
        lease = self._conductor.lease
        if self._lease is None and lease.held and await self._take(lease):
            await self._start(lease)

    async def _take(self, lease: Lease) -> bool:
        (result,) = await self._store.write(keeper_take(lease.id))
        return result.rowcount == 1

    async def _start(self, lease: Lease) -> None:
        log.info("keeper.begins", conductor=lease.id)
        numbers.lease_changed("keeper_won")
        numbers.keeper_is_here(True)
        self._lease = lease
        # In a task of its own: what is begun in it inherits guard and lease, and nothing else of this process does.
        opening = asyncio.create_task(self._open_kept(lease), name="keeper begins")
        try:
            await opening
        except BaseException:
            opening.cancel()
            await self._stop()
            raise

    async def _open_kept(self, lease: Lease) -> None:
        act_under(lease)
        guard_task(keeper_guard(lease.id))
        await self._kept.open()

    async def _stop(self) -> None:
        """Also where an earlier call was cancelled while it waited: what is kept is closed once, and to its end."""
        if self._lease is not None:
            self._lease = None
            numbers.keeper_is_here(False)
            self._stopping = asyncio.create_task(self._kept.close(), name="keeper stops")
        if self._stopping is not None:
            await asyncio.shield(self._stopping)
            self._stopping = None
