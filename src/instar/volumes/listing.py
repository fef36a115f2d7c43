"""Queries of the API's lists: pages, sorting, filters. Called by the routes."""

from __future__ import annotations

import ast
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from instar.errors import BadRequest
from instar.http.paging import next_links
from instar.http.request import Request
from instar.store.contract import Row, Value
from instar.store.volume_listing import ListQuery
from instar.store.volume_records import SnapshotRecord, VolumeRecord
from instar.volumes import microversion as since

_R = TypeVar("_R", VolumeRecord, SnapshotRecord)
METADATA_SCAN_MAX = 10_000  # records that one list with a metadata filter looks at
_TRUE, _FALSE = ("true", "1", "t", "yes", "on"), ("false", "0", "f", "no", "off")
_FLAGS = frozenset({"bootable", "multiattach"})
_NUMBERS = frozenset({"size"})
_NAMES = {"sort_key", "sort_dir", "sort", "limit", "offset", "marker", "all_tenants", "with_count", "metadata"}
_OFFSET_MAX = 10_000_000


def flag(name: str, text: str) -> bool:
    """Raises BadRequest."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise BadRequest(f"Invalid input for query parameter {name}: {text[:40]!r} is not a boolean.")


def list_query(request: Request, keys: Mapping[str, str], limit_max: int) -> ListQuery:
    """What a list asks for. Filters that nobody knows are let pass, as this API does. Raises BadRequest."""
    context = request.context
    every = request.query_one("all_tenants")
    everybody = context.is_admin and every is not None and (every == "" or flag("all_tenants", every))
    limit = _number(request, "limit", limit_max)
    equals: list[tuple[str, Value]] = []
    like: list[tuple[str, str]] = []
    for name, text in request.query:
        if name.endswith("~") and request.microversion >= since.NAME_LIKE and name[:-1] in ("name", "status"):
            like.append((name[:-1], text))
        elif name in keys and name not in _NAMES and not (name == "project_id" and not everybody):
            equals.append((name, _value(name, text)))
    return ListQuery(
        project_id=None if everybody else context.project_id,
        limit=min(limit or limit_max, limit_max) + 1,  # only a page that has a next one says so
        offset=min(_number(request, "offset", 0), _OFFSET_MAX),
        equals=tuple(equals),
        like=tuple(like),
        sort=_sort(request, keys),
        marker=request.query_one("marker") or None,
    )


def metadata_filter(request: Request) -> dict[str, str]:
    """`metadata={'key': 'value'}`: clients write it as a Python dict. Raises BadRequest."""
    text = request.query_one("metadata")
    if not text:
        return {}
    try:
        wanted = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRequest(f"Invalid input for query parameter metadata: {text[:60]!r} is not a dictionary.") from error
    if not isinstance(wanted, dict) or not all(isinstance(part, str) for item in wanted.items() for part in item):
        raise BadRequest(f"Invalid input for query parameter metadata: {text[:60]!r} is not a dictionary of strings.")
    return wanted


async def records_of(
    request: Request, query: ListQuery, fetch: Callable[[ListQuery], Awaitable[list[Row]]], from_row: Callable[[Row], _R]
) -> list[_R]:
    """The records of a list of volumes or snapshots. A filter on metadata is applied here: the database does not look into
    documents. Raises BadRequest."""
    wanted = metadata_filter(request)
    rows = await fetch(query._replace(limit=METADATA_SCAN_MAX) if wanted else query)
    records = [from_row(row) for row in rows]
    if wanted:
        records = [one for one in records if wanted.items() <= one.document.metadata.items()][: query.limit]
    return records


def page(request: Request, name: str, query: ListQuery, shown: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of a list: one more was read than is shown."""
    more = len(shown) >= query.limit
    body: dict[str, Any] = {name: shown[: query.limit - 1]}
    if more and query.limit > 1:
        body[f"{name}_links"] = next_links(request, body[name][-1]["id"])
    return body


def _value(name: str, text: str) -> Value:
    if name in _FLAGS:
        return int(flag(name, text))
    if name in _NUMBERS:
        if not (text.isascii() and text.isdigit() and len(text) < 12):
            raise BadRequest(f"Invalid input for query parameter {name}: {text[:40]!r} is not a number.")
        return int(text)
    return text


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_one(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise BadRequest(f"Invalid input for query parameter {name}: {text[:40]!r} is not a non-negative integer.")
    return int(text)


def _sort(request: Request, keys: Mapping[str, str]) -> tuple[tuple[str, bool], ...]:
    combined = request.query_one("sort")
    if combined:
        parts = [part.strip().partition(":") for part in combined.split(",")]
        wanted = [(key, direction or "desc") for key, _, direction in parts]
    else:
        names = request.query_all("sort_key") or ["created_at"]
        directions = request.query_all("sort_dir") or ["desc"]
        wanted = list(zip(names, directions + [directions[-1]] * len(names), strict=False))
    found = []
    for key, direction in wanted[:8]:
        if key not in keys:
            raise BadRequest(f"Invalid input for query parameter sort: {key[:40]!r} is no key to sort by.")
        if direction not in ("asc", "desc"):
            raise BadRequest(f"Invalid input for query parameter sort: {direction[:40]!r} is neither asc nor desc.")
        found.append((key, direction == "asc"))
    return tuple(found)
