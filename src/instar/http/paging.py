"""Lists in pages: `limit` and `marker` of the query, and the link to the next page."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlencode

from instar.errors import BadRequest
from instar.http.request import Request

MARKER_MAX_LENGTH = 255


class Page(NamedTuple):
    """At most `limit` records that come after the record `marker` (its id; None: from the start)."""

    limit: int
    marker: str | None


def read_page(request: Request, limit_max: int) -> Page:
    """`limit` is cut to `limit_max`, which also holds when none is given. Raises BadRequest for a limit that is no
    positive integer (0 means the maximum, as in the Compute API) and for a marker too long to be an id."""
    text = request.query_one("limit")
    limit = limit_max
    if text is not None:
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise BadRequest(f"Invalid input for query parameter limit: {text[:40]!r} is not a non-negative integer.")
        limit = min(int(text) or limit_max, limit_max)
    marker = request.query_one("marker") or None
    if marker is not None and len(marker) > MARKER_MAX_LENGTH:
        raise BadRequest("Invalid input for query parameter marker: too long.")
    return Page(limit, marker)


def next_url(request: Request, marker: str, limit: int | None = None) -> str:
    """The address of the next page: this request's own, from `marker` on, its other parameters kept."""
    kept = [(key, value) for key, value in request.query if key != "marker" and (limit is None or key != "limit")]
    if limit is not None:
        kept.append(("limit", str(limit)))
    kept.append(("marker", marker))
    return f"{request.origin}{request.path}?{urlencode(kept)}"


def next_links(request: Request, marker: str) -> list[dict[str, str]]:
    """`[{"rel": "next", "href": …}]`, as the Compute and Network APIs have it in `<things>_links`."""
    return [{"rel": "next", "href": next_url(request, marker)}]
