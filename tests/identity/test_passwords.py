"""Password checks: bounded in number, slow for everybody alike, and told to nobody."""

from __future__ import annotations

import asyncio

import structlog

from instar.config import IdentitySettings
from instar.http.faults import TooManyRequests
from instar.identity.passwords import WAITING_MAX, GuessLimiter, PasswordHasher
from tests.identity.identity_cloud import Cloud, by_password


async def test_checks_that_cannot_wait_any_more_are_sent_away() -> None:
    hasher = PasswordHasher(IdentitySettings(argon2_time_cost=1, argon2_memory_kib=8, auth_concurrency_max=1))
    hashed = await hasher.hash("right")
    checks = [hasher.verify(hashed, "right") for _ in range(WAITING_MAX + 5)]
    outcomes = await asyncio.gather(*checks, return_exceptions=True)
    assert outcomes.count(True) == WAITING_MAX
    assert sum(isinstance(outcome, TooManyRequests) for outcome in outcomes) == 5
    assert await hasher.verify(hashed, "right") is True
    assert await hasher.verify(hashed, "wrong") is False
    assert await hasher.verify("not a hash", "right") is False
    hasher.close()


def test_guesses_are_forgotten_after_a_minute_and_kept_in_bounded_memory() -> None:
    now = 0.0
    limiter = GuessLimiter(lambda: now)
    refused = 0
    for _ in range(limiter.PER_USER_MAX + 3):
        try:
            limiter.check("anna", "10.0.0.1")
        except TooManyRequests:
            refused += 1
        else:
            limiter.failed("anna", "10.0.0.1")
    assert refused == 3
    limiter.check("anna", "10.0.0.2")
    now += limiter.WINDOW_S
    limiter.check("anna", "10.0.0.1")
    for number in range(limiter.KEYS_MAX + 50):
        limiter.failed(str(number), f"10.1.{number // 250}.{number % 250}")
    assert len(limiter._failures) <= limiter.KEYS_MAX


async def test_no_password_and_no_token_is_logged(cloud: Cloud) -> None:
    with structlog.testing.capture_logs() as logs:
        token = await cloud.demo()
        await cloud.call("POST", "/auth/tokens", json=by_password("demo", "a-wrong-one", "demo"))
        await cloud.identity.records._store.close()  # from here on every request fails inside
        answer = await cloud.call("POST", "/auth/tokens", json=by_password("demo", cloud.first.demo_password, "demo"))
        other = await cloud.call("GET", "/users", token + "x")
    assert answer.status_code in (500, 503) and other.status_code == 401
    assert logs
    for secret in (cloud.first.demo_password, "a-wrong-one", token):
        assert secret not in str(logs) and secret not in answer.text
