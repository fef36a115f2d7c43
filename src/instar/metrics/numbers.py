"""Every number that a process of the cloud counts, by name. Called by the rooms where things happen; read by `page()`.

Labels are few and bounded: no ids of users' things, no paths, no names that users choose. The children of a number are kept
at hand, because a look-up by labels costs as much as counting does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUEUES = ("host.", "conductor", "volumes")
FAST_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)

REGISTRY = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_operations = Histogram(
    "instar_operation_seconds", "Operations that ended here, from being taken up", ["action", "result"],
    buckets=SLOW_S, registry=REGISTRY,
)  # fmt: skip
_operations_running = Gauge("instar_operations_running", "Operations that run here now", registry=REGISTRY)
_requests = Histogram(
    "instar_api_seconds", "Requests answered here, until their answer began", ["service", "method", "status"],
    buckets=FAST_S, registry=REGISTRY,
)  # fmt: skip
_store = Histogram(
    "instar_store_seconds", "Reads and transactions of the database; result: ok, refused (by a rule), failed",
    ["kind", "result"], buckets=FAST_S, registry=REGISTRY,
)  # fmt: skip
_store_retries = Counter(
    "instar_store_retries", "Transactions begun anew: conflict, connection", ["reason"], registry=REGISTRY
)
_calls = Histogram(
    "instar_bus_call_seconds", "Commands sent and answered; result: ok, error, timeout, nobody, failed",
    ["queue", "result"], buckets=SLOW_S, registry=REGISTRY,
)  # fmt: skip
_calls_unanswered = Gauge(
    "instar_bus_calls_unanswered", "Commands that wait for their answer now", ["queue"], registry=REGISTRY
)
_commands_worked_on = Gauge(
    "instar_bus_commands_worked_on", "Commands that this process works on now", ["queue"], registry=REGISTRY
)
_events = Counter("instar_bus_events", "Events told or heard", ["direction"], registry=REGISTRY)
_leases = Counter(
    "instar_lease_changes", "Operations taken over or lost, keeper's lease won or lost", ["change"], registry=REGISTRY
)
_keeper = Gauge("instar_keeper", "1 in the process that keeps reconciler and timers", registry=REGISTRY)


class _Asked(Collector):
    """Numbers that are asked for when somebody reads the page; without a source there are none."""

    def __init__(self, name: str, text: str, label: str) -> None:
        self._name, self._text, self._label = name, text, label
        self.source: Callable[[], Mapping[str, float]] | None = None
        REGISTRY.register(self)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [GaugeMetricFamily(self._name, self._text, labels=[self._label])]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._text, labels=[self._label])
        for value, number in (self.source() if self.source is not None else {}).items():
            family.add_metric([value], number)
        return [family]


_hosts = _Asked("instar_hosts", "Hosts as this process sees them: up, down, disabled (and up)", "state")
_queues = _Asked("instar_bus_queue_depth", "Messages that wait in the broker", "queue")


def page() -> bytes:
    """All numbers, as text."""
    return generate_latest(REGISTRY)


# --- what the rooms call ---------------------------------------------------------------------------------------------


def operation_began() -> None:
    _operations_running.inc()


def operation_left() -> None:
    """It ended, or goes on elsewhere."""
    _operations_running.dec()


def operation_ended(action: str, result: str, took_s: float) -> None:
    """`result`: ok, failed."""
    _operation(action, result).observe(took_s)


def request_answered(service: str, method: str, status: int, took_s: float) -> None:
    _request(service, method if method in METHODS else "other", status // 100).observe(took_s)


def store_did(kind: str, result: str, took_s: float) -> None:
    """`kind`: read, write; `result`: ok, refused, failed."""
    _of_store(kind, result).observe(took_s)


def store_retried(reason: str) -> None:
    """`reason`: conflict, connection."""
    _store_retries.labels(reason).inc()


def call_began(queue: str) -> None:
    _unanswered(_kind_of(queue)).inc()


def call_ended(queue: str, result: str, took_s: float) -> None:
    """`result`: ok, error, timeout, nobody, failed."""
    kind = _kind_of(queue)
    _unanswered(kind).dec()
    _call(kind, result).observe(took_s)


def command_began(queue: str) -> None:
    _worked_on(_kind_of(queue)).inc()


def command_ended(queue: str) -> None:
    _worked_on(_kind_of(queue)).dec()


def event_told() -> None:
    _event("told").inc()


def event_heard() -> None:
    _event("heard").inc()


def lease_changed(change: str) -> None:
    """`change`: taken_over, lost, keeper_won, keeper_lost."""
    _leases.labels(change).inc()


def keeper_is_here(is_here: bool) -> None:
    _keeper.set(int(is_here))


def hosts_from(source: Callable[[], Mapping[str, float]] | None) -> None:
    """Where the number of hosts by state comes from: up, down, disabled."""
    _hosts.source = source


def queues_from(source: Callable[[], Mapping[str, float]] | None) -> None:
    """Where the depths of the broker's queues come from; those of hosts are one number: the sum."""
    _queues.source = source


def _kind_of(queue: str) -> str:
    return next((kind.rstrip(".") for kind in QUEUES if queue.startswith(kind)), "other")


_operation = lru_cache(maxsize=None)(lambda action, result: _operations.labels(action, result))
_request = lru_cache(maxsize=None)(lambda service, method, hundreds: _requests.labels(service, method, f"{hundreds}xx"))
_of_store = lru_cache(maxsize=None)(lambda kind, result: _store.labels(kind, result))
_unanswered = lru_cache(maxsize=None)(lambda kind: _calls_unanswered.labels(kind))
_call = lru_cache(maxsize=None)(lambda kind, result: _calls.labels(kind, result))
_worked_on = lru_cache(maxsize=None)(lambda kind: _commands_worked_on.labels(kind))
_event = lru_cache(maxsize=None)(lambda direction: _events.labels(direction))
