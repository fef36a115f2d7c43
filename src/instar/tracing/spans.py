"""Spans of what is done, sent to an OpenTelemetry collector (OTLP over HTTP) where the settings name one.

request → operation → step → command at a host, each perhaps in another process: see `ids.py` for how they are joined.
Without a collector nothing of OpenTelemetry is loaded, and a span costs a function call. Spans carry names and ids, never
texts of users. A collector that is away costs spans, never requests: they wait in a bounded queue, in a thread of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from instar.config import TracingSettings
from instar.tracing import ids

TRACES_PATH = "/v1/traces"
WAITING_MAX = 8192  # spans; what comes beyond is dropped
CLOSE_MAX_MS = 3000
_OFF: AbstractContextManager[None] = nullcontext()
_provider: Any = None
_tracer: Any = None


def open_traces(settings: TracingSettings, service: str) -> None:
    """Collect spans from now on, if the settings say where to. `service` is the process's role: api, conductor …"""
    global _provider, _tracer
    if not settings.endpoint or _provider is not None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    endpoint = settings.endpoint.rstrip("/")
    exporter = OTLPSpanExporter(
        endpoint=endpoint if endpoint.endswith(TRACES_PATH) else endpoint + TRACES_PATH, timeout=settings.timeout_s
    )
    _provider = TracerProvider(
        resource=Resource.create({"service.name": f"instar-{service}", "service.namespace": "instar"}),
        id_generator=_id_generator(),
        shutdown_on_exit=False,
    )
    every_ms = round(settings.send_every_s * 1000)
    _provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=WAITING_MAX, schedule_delay_millis=every_ms)
    )
    _tracer = _provider.get_tracer("instar")


def close_traces() -> None:
    """Send what is left, if that can be done in a moment. Blocking."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.force_flush(CLOSE_MAX_MS)
        provider.shutdown()


def span(name: str, *, kind: str = "internal", parent: str = "", **attributes: str | int) -> AbstractContextManager[None]:
    """A span around the block. `kind`: internal, server (answers somebody), client (asks somebody). `parent`: a traceparent
    from elsewhere; else it is below the span of this task."""
    if _tracer is None:
        return _OFF
    return _span(name, kind, parent, attributes)


def request_span(request_id: str, method: str, service: str) -> AbstractContextManager[None]:
    """The first span of a request's trace."""
    if _tracer is None:
        return _OFF
    return _span(f"{method} {service}", "server", "", {"instar.request_id": request_id, "http.request.method": method})


def outgoing() -> str:
    """The traceparent for a message that is sent now; empty where nobody's request is worked on."""
    if _tracer is not None:
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
    return ids.first_span_of(ids.request_of_now(), sampled=_tracer is not None)


@contextmanager
def _span(name: str, kind: str, parent: str, attributes: dict[str, str | int]) -> Iterator[None]:
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    with _tracer.start_as_current_span(
        name, context=context, kind=SpanKind[kind.upper()], attributes=attributes, record_exception=False,
        set_status_on_exception=False,
    ) as current:  # fmt: skip
        try:
            yield
        except BaseException as error:
            current.set_status(Status(StatusCode.ERROR, type(error).__name__))  # its words may be a user's
            raise


def _id_generator() -> Any:
    """Ids of traces and of their first spans are those of requests."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class RequestIds(IdGenerator):
        def generate_trace_id(self) -> int:
            own = ids.trace_id_of(ids.request_of_now())
            return int(own, 16) if own else random.getrandbits(128) or 1

        def generate_span_id(self) -> int:
            if not trace.get_current_span().get_span_context().is_valid and (
                own := ids.trace_id_of(ids.request_of_now())
            ):
                return int(own[16:], 16)
            return random.getrandbits(64) or 1

    return RequestIds()
