"""One request is one trace, over HTTP, conductor, steps and hosts, at a real collector; and its id is in the log lines."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from instar.config import TracingSettings
from instar.http.answer import Answer, json_answer
from instar.http.app import Service, build_app
from instar.http.faults import compute_fault
from instar.http.policy import OPEN, Policy
from instar.http.request import Request
from instar.http.routing import Route
from instar.http.server import HttpServer
from instar.model.context import Authenticated
from instar.tracing import ids, spans
from tests.fixtures.small_http_server import Asked, SmallHttpServer
from tests.lifecycle.harness import Plane, prepared
from tests.patience import PATIENCE_S


class Collector:
    """Takes what OpenTelemetry's own exporter sends."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        server = SmallHttpServer("POST", self._take)
        self.url, self.close = server.url, server.close

    def _take(self, asked: Asked) -> tuple[int, bytes]:
        assert (asked.path, asked.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
        for resource in ExportTraceServiceRequest.FromString(asked.body).resource_spans:
            named = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.services.add(named["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return 200, b""


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    spans.open_traces(TracingSettings(endpoint=collector.url, send_every_s=60), "test")
    yield collector
    spans.close_traces()
    collector.close()


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Plane]:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    async with prepared(tmp_path / "cloud", image) as made:
        yield made


class Nobody:
    async def authenticate_token(self, token: str) -> Authenticated:
        raise AssertionError


async def _build_by_http(one: Plane) -> str:
    """Returns the request's id."""

    async def create(request: Request) -> Answer:
        context = msgspec.structs.replace(one.context(), request_id=request.context.request_id)
        await one.control.lifecycle.create(context, [await one.new()])
        return json_answer({}, 202)

    service = Service("compute", "compute", "/compute", [Route("POST", "/servers", "open", create)],
                      Policy({"open": OPEN}), compute_fault)  # fmt: skip
    server = HttpServer(build_app([service], Nobody(), body_max_bytes=1024), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{await server.start()}"
    try:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            answer = await client.post(f"{url}/compute/servers")
    finally:
        await server.stop(grace_s=1)
    assert answer.status_code == 202
    await one.settled()
    return answer.headers["x-openstack-request-id"]


async def test_request_operation_steps_and_host_commands_are_one_trace(collector, one):
    request_id = await _build_by_http(one)
    await asyncio.to_thread(spans.close_traces)
    own = [span for span in collector.spans if span.trace_id.hex() == ids.trace_id_of(request_id)]
    assert collector.services == {"instar-test"}
    by_id = {span.span_id: span for span in own}
    [root] = [span for span in own if not span.parent_span_id]
    assert (root.name, root.kind) == ("POST compute", Span.SPAN_KIND_SERVER)
    [operation] = [span for span in own if span.name == "operation create"]
    assert operation.parent_span_id == root.span_id
    steps = [span for span in own if span.name.startswith("step ")]
    assert len(steps) >= 4 and {span.parent_span_id for span in steps} == {operation.span_id}
    commands = [span for span in own if span.name.startswith("host ")]
    assert "host EnsureRunning" in {span.name for span in commands}
    assert {by_id[span.parent_span_id].name.split()[0] for span in commands} == {"step"}
    for span in own:
        assert span.end_time_unix_nano >= span.start_time_unix_nano > 0


async def test_failed_step_is_told_by_its_kind_and_never_by_its_words(collector, one):
    async def failing(name, call):  # type: ignore[no-untyped-def]
        raise RuntimeError("a secret of a user")

    one.around_step = failing
    await _build_by_http(one)
    await asyncio.to_thread(spans.close_traces)
    failed = [span for span in collector.spans if span.status.code == 2]
    assert failed and all("secret" not in str(span) for span in collector.spans)


async def test_collector_that_is_away_costs_no_request(one):
    spans.open_traces(TracingSettings(endpoint="http://127.0.0.1:9", send_every_s=0.05, timeout_s=0.2), "test")
    try:
        assert await _build_by_http(one)
    finally:
        await asyncio.to_thread(spans.close_traces)


def test_without_a_collector_nothing_of_opentelemetry_is_loaded():
    code = (
        "import sys; from instar.tracing import ids, spans; import instar.http.app, instar.engine.conductor\n"
        "ids.bind('req-11111111-2222-4333-8444-555555555555')\n"
        "with spans.span('x'): print(spans.outgoing())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "00-11111111222243338444555555555555-8444555555555555-00"


def test_request_is_known_from_the_traceparent_of_its_messages():
    request_id = f"req-{uuid.uuid4()}"
    assert ids.request_of(ids.first_span_of(request_id, sampled=True)) == request_id
    assert ids.request_of("") == ids.request_of("nonsense") == ""
    assert ids.first_span_of("", sampled=True) == ids.first_span_of("req-x", sampled=False) == ""


async def test_lines_of_an_operation_and_of_its_hosts_carry_the_request(one):
    lines: list[dict[str, object]] = []

    def keep(_logger: object, _method: str, event: dict[str, object]) -> dict[str, object]:
        lines.append(dict(event))
        return event

    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, keep, structlog.dev.ConsoleRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(0),  # whatever an earlier test left: every line
    )
    seen: list[str] = []
    hypervisor = next(iter(one.control.agent._hypervisors.values()))
    try:
        for one_host in one.control.agent._hypervisors.values():
            start = one_host.ensure_running

            async def noted(guest, start=start):  # type: ignore[no-untyped-def]
                structlog.get_logger().info("here", guest=guest.instance_id)
                seen.append(guest.instance_id)
                return await start(guest)

            one_host.ensure_running = noted
        request_id = await _build_by_http(one)
    finally:
        structlog.configure(**before)
    assert hypervisor is not None and len(seen) == 1
    [at_host] = [line for line in lines if line["event"] == "here"]
    assert (at_host["request_id"], at_host["instance_id"]) == (request_id, seen[0])
    [done] = [line for line in lines if line["event"] == "operation.done"]
    assert done["request_id"] == request_id and done["operation_id"]
