"""Time as records keep it: whole microseconds since the epoch, UTC."""

from __future__ import annotations

import time
from datetime import UTC, datetime

MICROS_PER_S = 1_000_000


def now_us() -> int:
    return time.time_ns() // 1000


def iso(time_us: int) -> str:
    """`2026-01-31T12:00:00Z`, as the Compute API writes a time."""
    return datetime.fromtimestamp(time_us // MICROS_PER_S, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def iso_us(time_us: int) -> str:
    """`2026-01-31T12:00:00.000000`, as instance actions write a time."""
    seconds, micros = divmod(time_us, MICROS_PER_S)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{micros:06d}"
