"""The port by which a process is watched: what it has counted, whether it lives and can work. For every kind of process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from instar.bus.contract import Bus
from instar.config import MetricsSettings
from instar.errors import StartupError
from instar.http.health import HealthApp, HealthPages, Probe
from instar.http.server import HttpServer
from instar.store.contract import Store

log = structlog.get_logger()

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


class HealthPort:
    """Open it last: from then on the process may be asked whether it is ready."""

    def __init__(self, settings: MetricsSettings, probes: Mapping[str, Probe]) -> None:
        self._settings = settings
        self._app = HealthApp(HealthPages(probes, metrics=True))
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
