"""The Range header of a download (RFC 9110, section 14). Called by `api.py`."""

from __future__ import annotations

import re
from typing import NamedTuple

from instar.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


class ByteRange(NamedTuple):
    """`length` bytes from `start`."""

    start: int
    length: int


def requested_range(header: str, size_bytes: int) -> ByteRange | None:
    """The one range asked for; None where none is, or one that may be ignored. Raises RangeNotSatisfiable."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size_bytes - int(match[2])), size_bytes
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
        if match[2] and int(match[2]) < start:
            return None
    if start >= size_bytes or start >= end:
        raise RangeNotSatisfiable(range=header.strip(), size_bytes=size_bytes)
    return ByteRange(start, end - start)
