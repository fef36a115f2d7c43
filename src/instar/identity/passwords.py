"""Password hashes: argon2id in a few threads, and a bound on wrong guesses. Used by `local.py` alone."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import argon2
from argon2.exceptions import InvalidHashError, VerificationError

from instar.config import IdentitySettings
from instar.errors import BadRequest
from instar.http.faults import TooManyRequests

T = TypeVar("T")

WAITING_MAX = 64  # password checks that may wait for a thread; more are told to come back


class PasswordHasher:
    """Hashes and verifies with the cost of the settings. At most `auth_concurrency_max` at once: each takes memory."""

    def __init__(self, settings: IdentitySettings) -> None:
        self._argon2 = argon2.PasswordHasher(
            time_cost=settings.argon2_time_cost, memory_cost=settings.argon2_memory_kib, parallelism=1
        )
        self._length_max = settings.password_max_length
        self._threads = ThreadPoolExecutor(settings.auth_concurrency_max, thread_name_prefix="password")
        self._waiting = 0
        self._nobody: str | None = None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_length(self, password: str) -> None:
        """Raises BadRequest for a password that is empty or longer than the setting identity.password_max_length."""
        if not password or len(password) > self._length_max:
            raise BadRequest(f"A password must have between 1 and {self._length_max} characters.")

    async def hash(self, password: str) -> str:
        """Raises BadRequest (length), TooManyRequests."""
        self.check_length(password)
        return await self._in_thread(self._argon2.hash, password)

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """False as well, and as slowly, where there is no hash to compare with. Raises TooManyRequests."""
        if len(password) > self._length_max:
            password = ""  # no stored password is empty: it costs the same and cannot match
        return await self._in_thread(self._verify, password_hash, password)

    def _verify(self, password_hash: str | None, password: str) -> bool:
        if password_hash is None:
            if self._nobody is None:
                self._nobody = self._argon2.hash(secrets.token_hex(16))
            self._compare(self._nobody, password)
            return False
        return self._compare(password_hash, password)

    def _compare(self, password_hash: str, password: str) -> bool:
        try:
            return self._argon2.verify(password_hash, password)
        except (VerificationError, InvalidHashError):
            return False

    async def warm(self) -> None:
        """Makes the hash that unknown users are compared with, so that the first of them takes no longer."""
        await self.verify(None, "")

    async def _in_thread(self, call: Callable[..., T], *args: str | None) -> T:
        if self._waiting >= WAITING_MAX:
            raise TooManyRequests(retry_after_s=1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
        finally:
            self._waiting -= 1


class _Failures(NamedTuple):
    guesses: int
    first_at: float


class GuessLimiter:
    """Wrong passwords are counted for a user from an address, and for an address in all. Bounded in memory.

    By user and address together: nobody locks another one out by guessing at his name from elsewhere. Each API process
    counts for itself: with several behind one port somebody has so many guesses at each of them, which is still nothing
    against a password of any strength, and costs no write in the database for each wrong one."""

    WINDOW_S = 60.0
    PER_USER_MAX = 20
    PER_ADDRESS_MAX = 200
    KEYS_MAX = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[tuple[str, ...], _Failures] = OrderedDict()

    def check(self, user: str, address: str) -> None:
        """Raises TooManyRequests with the seconds to wait."""
        now = self._clock()
        for key, most in (((user, address), self.PER_USER_MAX), ((address,), self.PER_ADDRESS_MAX)):
            failures = self._failures.get(key)
            if failures and failures.guesses >= most and now - failures.first_at < self.WINDOW_S:
                raise TooManyRequests(retry_after_s=int(self.WINDOW_S - (now - failures.first_at)) + 1)

    def failed(self, user: str, address: str) -> None:
        now = self._clock()
        for key in ((user, address), (address,)):
            failures = self._failures.pop(key, None)
            if failures is None or now - failures.first_at >= self.WINDOW_S:
                failures = _Failures(0, now)
            self._failures[key] = failures._replace(guesses=failures.guesses + 1)
            if len(self._failures) > self.KEYS_MAX:
                self._failures.popitem(last=False)

    def succeeded(self, user: str, address: str) -> None:
        self._failures.pop((user, address), None)
