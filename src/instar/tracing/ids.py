"""The ids that everything done for a request has in common: in log lines, in messages between processes, in traces.

A request's id is `req-` and a UUID; the same 128 bits are the id of its trace, and their second half is that of the trace's
first span. So whoever knows the request (an operation's record does, for ever) can join its trace, and a message that
carries a W3C traceparent says whose request it serves, whether or not traces are collected.
"""

from __future__ import annotations

import re
from contextvars import ContextVar

import structlog

PREFIX = "req-"
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_request: ContextVar[str] = ContextVar("request_id", default="")


def bind(request_id: str, **fields: object) -> None:
    """What is logged and sent in this task from now on, and in those that it starts, belongs to this request."""
    _request.set(request_id)
    structlog.contextvars.bind_contextvars(request_id=request_id, **fields)


def request_of_now() -> str:
    """The request that this task works for; empty where it is nobody's."""
    return _request.get()


def trace_id_of(request_id: str) -> str:
    """32 hexadecimal digits; empty for what is no request's id."""
    digits = request_id.removeprefix(PREFIX).replace("-", "")
    return digits if len(digits) == 32 and set(digits) <= set("0123456789abcdef") else ""


def first_span_of(request_id: str, *, sampled: bool) -> str:
    """The traceparent of the request itself; empty for what is no request's id."""
    digits = trace_id_of(request_id)
    return f"00-{digits}-{digits[16:]}-{'01' if sampled else '00'}" if digits else ""


def request_of(traceparent: str) -> str:
    """The request's id in the trace; empty for what is no traceparent."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return ""
    digits = match[1]
    return f"{PREFIX}{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
