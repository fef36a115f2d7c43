"""How the program's log looks: on standard error, a readable line for each event, or a JSON object for machines.

Called once, before anything logs. Tracebacks are written without local variables: those may hold tokens and passwords.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import structlog
from structlog.typing import Processor

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMATS = ("console", "json")
LINE_MAX_CHARACTERS = 2_000  # of one event; tracebacks come after it, whole
_OPERATIONS = {"operation.done": "ok", "operation.failed": "FAILED"}


def configure_log(log_format: str, level: str) -> None:
    """`log_format` is one of FORMATS, `level` one of LEVELS."""
    render: Processor = structlog.processors.JSONRenderer() if log_format == "json" else render_line
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,  # request_id, operation_id … of what is being done
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.UnicodeDecoder(),
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries: only what is worth a line, in the same place.
    for name in ("aiormq", "aio_pika"):  # what they log they raise as well, and the bus says it in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s %(message)s")


def render_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """`12:00:01.250 info    create ok in 812 ms, server 1111…, req-…` for an operation; else the event and its fields."""
    fields = dict(event)
    name, level = str(fields.pop("event", "")), str(fields.pop("level", "info"))
    time = _clock(str(fields.pop("timestamp", "")))
    trace = fields.pop("exception", None)
    request_id = fields.pop("request_id", None)  # in the words of an operation's end already
    if name in _OPERATIONS:
        fields.pop("operation_id", None)
        said = f"{fields.pop('action', '?')} {_OPERATIONS[name]} in {fields.pop('took_ms', '?')} ms"
        said += f", server {fields.pop('instance', '?')}, {fields.pop('request', '?')}"
        if "reason" in fields:
            said += f": {fields.pop('reason')}"
    else:
        said = name
        if request_id is not None:
            fields["request_id"] = request_id
    said = " ".join([said, *(f"{key}={_plain(value)}" for key, value in fields.items())])
    line = f"{time} {level:7} {_one_line(said)[:LINE_MAX_CHARACTERS]}"
    return f"{line}\n{trace}" if trace else line


def _clock(stamp: str) -> str:
    try:
        return datetime.fromisoformat(stamp).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    except ValueError:
        return stamp


def _plain(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text else text


def _one_line(text: str) -> str:
    """What users wrote cannot forge a line of the log."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
