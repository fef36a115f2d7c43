"""What a handler returns. Bodies are bytes, ready to send; only image data comes as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from instar.http.body import encode

Header = tuple[bytes, bytes]
JSON = b"application/json"


class Answer(NamedTuple):
    """Status, body and headers (lower-case names). `stream` takes the place of `body`: chunks, sent as they come;
    give its `length_bytes` where it is known."""

    status: int
    body: bytes = b""
    content_type: bytes = b""
    headers: Sequence[Header] = ()
    stream: AsyncIterator[bytes] | None = None
    length_bytes: int | None = None


def json_answer(value: Any, status: int = 200, headers: Sequence[Header] = ()) -> Answer:
    """`value` as JSON; whatever msgspec encodes."""
    return Answer(status, encode(value), JSON, headers)


def raw_json_answer(body: bytes, status: int = 200, headers: Sequence[Header] = ()) -> Answer:
    """JSON that is encoded already."""
    return Answer(status, body, JSON, headers)


def empty_answer(status: int = 204, headers: Sequence[Header] = ()) -> Answer:
    return Answer(status, headers=headers)


def stream_answer(
    chunks: AsyncIterator[bytes],
    *,
    content_type: bytes = b"application/octet-stream",
    length_bytes: int | None = None,
    status: int = 200,
    headers: Sequence[Header] = (),
) -> Answer:
    """A body that is never in memory as a whole. The iterator is closed when the client goes away."""
    return Answer(status, b"", content_type, headers, chunks, length_bytes)
