"""Whether a host may change anything: not after it was cut off, until the control plane has told it what it lost meanwhile.

An agent asks with its reports to be heard, and a conductor answers. When no answer comes for the lease's time, the control
plane may soon give the host's guests to others; so the agent shuts its hosts before that, and takes only questions. A
session is a number that a host has from one admission to the next: commands that were meant for an earlier one are refused.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from instar.errors import HostNotReady

log = structlog.get_logger()

LEASE_PART = 0.6  # of the time after which a silent host is down: it is shut well before
ASKS_REMEMBERED = 16
SESSION_MAX = 2**53


def clock_of_life() -> float:
    """Seconds that pass also while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Admission:
    """Of all hosts of one agent. `path` keeps over restarts which hosts are shut; None keeps it in memory.

    A control plane that never answers (one of an earlier version) shuts nobody out."""

    def __init__(
        self, hosts: Iterable[str], path: Path | None, *, down_after_s: float, clock: Callable[[], float] = clock_of_life
    ) -> None:
        self._path = path
        self._lease_s = down_after_s * LEASE_PART
        self._clock = clock
        self._sessions = {host: _new_session() for host in hosts}
        self._shut: set[str] = set()
        self._asked: dict[int, float] = {}
        self._next_ask = secrets.randbelow(1 << 31)
        self._heard_at: float | None = None  # None: no answer ever

    def open(self) -> None:
        """One that was answered before its process ended begins shut: it may have been cut off since."""
        if self._path is not None and self._path.exists():
            self._shut = set(self._sessions)

    def ask(self) -> int:
        """A number to be answered, for the next report."""
        self._next_ask += 1
        self._asked[self._next_ask] = self._clock()
        while len(self._asked) > ASKS_REMEMBERED:
            del self._asked[next(iter(self._asked))]
        return self._next_ask

    def answered(self, number: int) -> None:
        """Somebody heard the report with this number. The lease runs from when it was asked for."""
        asked_at = self._asked.pop(number, None)
        if asked_at is None:
            return
        if self._heard_at is None and self._path is not None and not self._path.exists():
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self.look()  # a late answer does not undo that the lease ran out
        self._heard_at = max(asked_at, self._heard_at or asked_at)

    def look(self) -> None:
        """Shut the hosts when the lease has run out."""
        if self._heard_at is None or self._clock() - self._heard_at <= self._lease_s:
            return
        log.warning("agent.shut", hosts=len(self._sessions), silent_s=round(self._clock() - self._heard_at, 1))
        self._heard_at = None
        self._shut = set(self._sessions)
        self._sessions = {host: _new_session() for host in self._sessions}

    def session_of(self, host: str) -> int:
        return self._sessions[host]

    def is_shut(self, host: str) -> bool:
        self.look()
        return host in self._shut

    def check(self, host: str, session: int) -> None:
        """Raises HostNotReady for a command that may not be done: nothing of it is done then. `session` 0: its sender knows
        of no sessions."""
        if self.is_shut(host) or session not in (0, self._sessions[host]):
            raise HostNotReady(host=host)

    def admit(self, host: str, session: int) -> None:
        """The control plane has told all that it had to. Raises HostNotReady when the host was shut again meanwhile."""
        self.look()
        if session != self._sessions[host]:
            raise HostNotReady(host=host)
        if host in self._shut:
            self._shut.discard(host)
            log.info("agent.admitted", host=host)


def _new_session() -> int:
    return 1 + secrets.randbelow(SESSION_MAX)
