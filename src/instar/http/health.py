"""What says of a process whether it lives, whether it can work, and what it has counted. Without authentication.

`/healthz`: it answers. `/readyz`: what it needs can be reached; a balancer sends requests elsewhere while it says 503.
`/metrics`: the numbers, only on the port that is meant for them. No page says more of what is away than its name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from instar.http.answer import Answer, json_answer
from instar.metrics import numbers

log = structlog.get_logger()

Probe = Callable[[], Awaitable[object]]

PROBE_MAX_S = 2.0
ANSWER_KEPT_S = 1.0  # however often anybody asks, the database and the bus are asked once in this time


class HealthPages:
    """`probes`: what the process needs, by name; a probe that raises, or takes too long, says that it is away. `before` is
    awaited before the numbers are shown: it looks up what nobody counts."""

    def __init__(self, probes: Mapping[str, Probe], *, metrics: bool = False, before: Probe | None = None) -> None:
        self._probes = dict(probes)
        self._before = before
        self._metrics = metrics
        self._checked: tuple[float, dict[str, str]] | None = None
        self._checking = asyncio.Lock()

    async def answer(self, path: str) -> Answer | None:
        """The page at this path; None where there is none."""
        if path == "/healthz":
            return json_answer({"alive": True})
        if path == "/readyz":
            checks = await self._check()
            ready = all(state == "ok" for state in checks.values())
            return json_answer({"ready": ready, "checks": checks}, 200 if ready else 503)
        if path == "/metrics" and self._metrics:
            if self._before is not None:
                await self._state("numbers", self._before)
            return Answer(200, await asyncio.to_thread(numbers.page), numbers.CONTENT_TYPE)
        return None

    async def _check(self) -> dict[str, str]:
        async with self._checking:
            now = time.monotonic()
            if self._checked is None or now - self._checked[0] > ANSWER_KEPT_S:
                states = await asyncio.gather(*(self._state(name, probe) for name, probe in self._probes.items()))
                self._checked = (time.monotonic(), dict(zip(self._probes, states, strict=True)))
            return self._checked[1]

    async def _state(self, name: str, probe: Probe) -> str:
        try:
            async with asyncio.timeout(PROBE_MAX_S):
                await probe()
        except Exception as error:
            log.warning("health.away", what=name, error=repr(error)[:300])
            return "away"
        return "ok"


class HealthApp:
    """An ASGI application of these pages alone: for the port of a process that has no API, or keeps them apart."""

    def __init__(self, pages: HealthPages) -> None:
        self._pages = pages

    async def __call__(self, scope: dict[str, object], _receive: object, send: Callable[..., Awaitable[None]]) -> None:
        if scope["type"] != "http":
            return
        answer = await self._pages.answer(str(scope["path"])) if scope["method"] in ("GET", "HEAD") else None
        answer = answer or json_answer({"pages": ["/healthz", "/readyz", "/metrics"]}, 404)
        headers = [(b"content-type", answer.content_type), (b"content-length", str(len(answer.body)).encode())]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})
