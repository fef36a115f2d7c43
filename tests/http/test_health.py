"""What says whether a process lives and can work, and what it has counted: without a token, and without a secret."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from instar.bus.memory import MemoryBus
from instar.cli.health_port import HealthPort, probes_of
from instar.config import MetricsSettings
from instar.errors import Unavailable
from instar.http import health
from instar.http.answer import json_answer
from instar.http.app import App, Service, build_app
from instar.http.faults import compute_fault
from instar.http.health import HealthPages
from instar.http.policy import OPEN, Policy
from instar.http.routing import Route
from instar.http.server import HttpServer
from instar.metrics import numbers
from instar.model.context import Authenticated
from tests.patience import PATIENCE_S


class Nobody:
    async def authenticate_token(self, token: str) -> Authenticated:
        raise AssertionError("nobody has a token here")


@asynccontextmanager
async def served(app: App) -> AsyncIterator[httpx.AsyncClient]:
    server = HttpServer(app, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{await server.start()}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            yield client
    finally:
        await server.stop(grace_s=1)


def app_with(pages: HealthPages) -> App:
    async def fine(request):
        return json_answer({})

    async def away(request):
        raise Unavailable(retry_after_s=3)

    routes = [Route("GET", "/fine", "open", fine), Route("GET", "/away", "open", away)]
    one = Service("compute", "compute", "/compute", routes, Policy({"open": OPEN}), compute_fault)
    return build_app([one], Nobody(), body_max_bytes=1024, health=pages)


class Database:
    def __init__(self) -> None:
        self.asked, self.error, self.pause_s = 0, None, 0.0

    async def read(self, sql, params=None):
        self.asked += 1
        await asyncio.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        return []


def families(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.values()))] = sample.value
    return found


async def test_process_is_ready_while_what_it_needs_can_be_reached(monkeypatch):
    monkeypatch.setattr(health, "ANSWER_KEPT_S", 0.0)
    database, bus = Database(), MemoryBus()
    pages = HealthPages(probes_of(store=database, bus=bus))  # type: ignore[arg-type]
    async with served(app_with(pages)) as client:
        assert (await client.get("/healthz")).json() == {"alive": True}
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "checks": {"database": "ok", "bus": "ok"}})
        database.error = ConnectionRefusedError("postgresql://user:secret@10.0.0.1")
        away = await client.get("/readyz")
        assert (away.status_code, away.json()["checks"]) == (503, {"database": "away", "bus": "ok"})
        assert "secret" not in away.text and "10.0.0.1" not in away.text
        assert (await client.get("/healthz")).status_code == 200, "it lives all the same"
        monkeypatch.setattr(health, "PROBE_MAX_S", 0.05)
        database.error, database.pause_s = None, 5.0
        assert (await client.get("/readyz")).status_code == 503
        monkeypatch.setattr(bus, "listening_s", lambda: 7.0)
        assert (await client.get("/readyz")).json()["checks"]["bus"] == "away"


async def test_many_who_ask_at_once_cost_one_look(monkeypatch):
    database = Database()
    async with served(app_with(HealthPages(probes_of(store=database)))) as client:  # type: ignore[arg-type]
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert database.asked == 1


async def test_database_that_is_away_is_503_with_the_time_to_wait():
    async with served(app_with(HealthPages({}))) as client:
        answer = await client.get("/compute/away")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


async def test_numbers_are_on_their_own_port_alone_unless_the_settings_say_otherwise():
    async with served(app_with(HealthPages({}))) as client:
        assert (await client.get("/metrics")).status_code == 404
    async with served(app_with(HealthPages({}, metrics=True))) as client:
        assert (await client.get("/metrics")).status_code == 200


async def test_requests_are_counted_by_service_method_and_class_of_status():
    def count(status: str) -> float:
        counted = families(numbers.page().decode()).get("instar_api_seconds_count", {})
        return counted.get(tuple(sorted(("compute", "GET", status))), 0)

    before = count("2xx"), count("4xx"), count("5xx")
    async with served(app_with(HealthPages({}))) as client:
        for path in ("fine", "fine", "away", "b/" + "1" * 36):
            await client.get(f"/compute/{path}")
        await client.request("PROPFIND", "/compute/fine")
    assert (count("2xx") - before[0], count("4xx") - before[1], count("5xx") - before[2]) == (2, 1, 1)
    text = numbers.page().decode()
    assert "PROPFIND" not in text and 'method="other"' in text and "1" * 36 not in text


@pytest.fixture
def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


async def test_processes_of_one_machine_have_ports_one_after_the_other(free_port):
    settings = MetricsSettings(port=free_port, ports_max=10)
    ports = [HealthPort(settings, probes_of(bus=MemoryBus())) for _ in range(2)]
    try:
        for one in ports:
            await one.open()
        assert 0 < ports[0].port < ports[1].port
        numbers.hosts_from(lambda: {"up": 3, "down": 1})
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            answer = await client.get(f"http://127.0.0.1:{ports[1].port}/metrics")
            assert (await client.get(f"http://127.0.0.1:{ports[0].port}/readyz")).json()["ready"]
            assert (await client.get(f"http://127.0.0.1:{ports[0].port}/other")).status_code == 404
            assert (await client.post(f"http://127.0.0.1:{ports[0].port}/metrics")).status_code == 404
        assert answer.headers["content-type"].startswith("text/plain")
        found = families(answer.text)
        assert found["instar_hosts"] == {("up",): 3, ("down",): 1}
        assert "process_resident_memory_bytes" in found
    finally:
        numbers.hosts_from(None)
        for one in ports:
            await one.close()
