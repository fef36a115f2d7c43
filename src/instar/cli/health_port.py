"""The port by which a process is watched: what it has counted, whether it lives and can work. For every kind of process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from instar.bus.contract import DEAD, Bus
from instar.config import MetricsSettings
from instar.errors import StartupError
from instar.http.health import HealthApp, HealthPages, Probe
from instar.http.server import HttpServer
from instar.metrics import numbers
from instar.model.commands import CONDUCTOR_QUEUE
from instar.model.storage import STORAGE_QUEUE
from instar.store.contract import Store

log = structlog.get_logger()

QUEUES = (CONDUCTOR_QUEUE, STORAGE_QUEUE, DEAD)
DEPTHS_KEPT_S = 1.0
STOP_GRACE_S = 1.0
LISTEN_S = 0.02  # the bus's clock must go on in it


def probes_of(*, store: Store | None = None, bus: Bus | None = None) -> dict[str, Probe]:
    """What a process needs that works with these."""
    found: dict[str, Probe] = {}
    if store is not None:
        asked = store

        async def database() -> None:
            await asked.read("SELECT 1 AS one")

        found["database"] = database
    if bus is not None:
        heard = bus

        async def connected() -> None:
            before = heard.listening_s()
            await asyncio.sleep(LISTEN_S)
            if heard.listening_s() <= before:
                raise ConnectionError("the bus is cut off")

        found["bus"] = connected
    return found


def queue_depths(bus: Bus) -> Probe:
    """Looks how much waits in the queues of the whole cloud, for the metrics; at most once in DEPTHS_KEPT_S."""
    found: dict[str, float] = {}
    looked_at = float("-inf")

    async def look() -> None:
        nonlocal looked_at
        if time.monotonic() - looked_at < DEPTHS_KEPT_S:
            return
        looked_at = time.monotonic()
        found.clear()  # a broker that is away has none, rather than old ones
        numbers.queues_from(lambda: dict(found))
        for queue in QUEUES:
            waiting = await bus.waiting(queue)
            if waiting is not None:
                found[queue] = waiting

    return look


class HealthPort:
    """Open it last: from then on the process may be asked whether it is ready. `before`: see `HealthPages`."""

    def __init__(
        self, settings: MetricsSettings, probes: Mapping[str, Probe], *, before: Probe | None = None
    ) -> None:
        self._settings = settings
        self._app = HealthApp(HealthPages(probes, metrics=True, before=before))
        self._server: HttpServer | None = None
        self.port = 0  # where it listens; 0: nowhere

    async def open(self) -> None:
        """A port that cannot be had stops no process: it goes on unwatched, and says so."""
        first = self._settings.port
        if not first:
            return
        for port in range(first, min(first + self._settings.ports_max, 65_536)):
            server = HttpServer(self._app, self._settings.host, port)
            try:
                self.port = await server.start()
            except StartupError:
                continue
            self._server = server
            log.info("metrics.listening", host=self._settings.host, port=self.port)
            return
        log.error("metrics.no_port", host=self._settings.host, first=first, tried=self._settings.ports_max)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
