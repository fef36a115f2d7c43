"""Guests of which their hosts told something: each is looked at soon, whatever other hosts do.

An event says only that there is something to look at: a guest that has many is looked at once. The guests of one host
come one after another, hosts beside each other: one that gives no answer keeps nobody waiting but its own guests, and not
each of them for as long as it takes to see that. Used by the reconciler.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from instar.errors import HOST_AWAY, InstarError

log = structlog.get_logger()

HOSTS_AT_ONCE = 32
GUESTS_WAITING_MAX = 10_000
BUSY_RETRY_S = 1.0

Guest = tuple[str, str]  # host, instance id


class GuestEvents:
    """`look` is called with host and guest; where it returns False (an operation is in flight), again a moment later.
    `host_away` is told of a host that gave no answer: whoever looks at the whole of it sees to its guests."""

    def __init__(self, look: Callable[[str, str], Awaitable[bool]], host_away: Callable[[str], None]) -> None:
        self._look = look
        self._host_away = host_away
        self._waiting: set[Guest] = set()  # each of them once: this bounds all that is kept here
        self._turns: dict[str, deque[str]] = {}  # of the hosts that wait for one who looks, or have one
        self._hosts: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Begin to look."""
        self._tasks = [asyncio.create_task(self._run(), name="power sync") for _ in range(HOSTS_AT_ONCE)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # It may be opened again: nothing is left of hosts that were just being looked at.
        self._waiting.clear()
        self._turns.clear()
        self._hosts = asyncio.Queue()

    @property
    def waiting(self) -> int:
        """Guests that are to be looked at."""
        return len(self._waiting)

    def put(self, host: str, instance_id: str) -> None:
        """Something happened to the guest. More than there is room for is lost: the reconciler's timer finds it."""
        guest = (host, instance_id)
        if guest not in self._waiting and len(self._waiting) < GUESTS_WAITING_MAX:
            self._waiting.add(guest)
            self._queue(guest)

    def _queue(self, guest: Guest) -> None:
        host, instance_id = guest
        if host in self._turns:
            self._turns[host].append(instance_id)
        else:
            self._turns[host] = deque((instance_id,))
            self._hosts.put_nowait(host)

    async def _run(self) -> None:
        while True:
            host = await self._hosts.get()
            turns = self._turns[host]
            while turns:
                instance_id = turns.popleft()
                self._waiting.discard((host, instance_id))  # before the look: what comes during it asks for another
                await self._look_at(host, instance_id)
            del self._turns[host]

    async def _look_at(self, host: str, instance_id: str) -> None:
        guest = (host, instance_id)
        try:
            if not await self._look(host, instance_id) and guest not in self._waiting:
                self._waiting.add(guest)
                asyncio.get_running_loop().call_later(BUSY_RETRY_S, self._queue, guest)
        except HOST_AWAY as error:
            log.info("power.not_synced", instance=instance_id, host=host, reason=error.message)
            turns = self._turns[host]
            self._waiting.difference_update((host, one) for one in turns)
            turns.clear()
            self._host_away(host)
        except InstarError as error:
            log.info("power.not_synced", instance=instance_id, reason=error.message)
        except Exception:
            log.exception("power.sync_failed")
