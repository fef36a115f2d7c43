"""The query of `GET /v2/images` as an `ImageQuery`. Called by `api.py`.

Filters on fields, `in:` for several values, times with an operator (`gte:2026-01-31T00:00:00Z`); every parameter that
is nothing else is a custom property.
"""

from __future__ import annotations

import csv
from datetime import UTC, datetime

from instar.errors import BadRequest
from instar.http.request import Request
from instar.images.fields import VISIBILITIES, Caller
from instar.images.sharing import MEMBER_STATUSES
from instar.store.contract import Value
from instar.store.image_queries import EQUALS, SORT_KEYS, ImageQuery
from instar.store.images import ImageRecord

IN_VALUES_MAX = 200
_PAGING = frozenset({"limit", "marker", "sort", "sort_key", "sort_dir"})
_ONCE = frozenset({"visibility", "member_status", "os_hidden", "size_min", "size_max"})
_SEVERAL = frozenset({"id", "name", "status", "container_format", "disk_format"})
_TIMES = frozenset({"created_at", "updated_at"})
_TIME_OPERATORS = ("gt", "gte", "lt", "lte", "eq", "neq")
_DIRECTIONS = ("asc", "desc")
_DEFAULT_SORT = (("created_at", False), ("id", False))


def image_query(request: Request, caller: Caller, *, limit: int, marker: ImageRecord | None) -> ImageQuery:
    """Raises BadRequest for a value that is none."""
    equals: dict[str, tuple[Value, ...]] = {}
    ranges: list[tuple[str, str, int]] = []
    tags: list[str] = []
    properties: dict[str, str] = {}
    for name, text in request.query:
        if name == "tag":
            tags.append(text)
        elif name in EQUALS:
            equals[name] = _alternatives(name, text)
        elif name in _TIMES:
            ranges.append(_time_range(name, text))
        elif name not in _PAGING and name not in _ONCE:
            properties[name] = text
    for name, operator in (("size_min", "gte"), ("size_max", "lte")):
        text_or_none = request.query_one(name)
        if text_or_none is not None:
            ranges.append(("size", operator, _number(name, text_or_none)))
    return ImageQuery(
        project_id=caller.project_id,
        is_admin=caller.is_admin,
        sort=_sort(request),
        limit=limit,
        visibility=_one_of(request, "visibility", (*VISIBILITIES, "all")),
        member_status=_one_of(request, "member_status", (*MEMBER_STATUSES, "all")) or "accepted",
        hidden=_boolean("os_hidden", request.query_one("os_hidden") or "false"),
        equals=equals,
        ranges=tuple(ranges),
        tags=tuple(tags),
        properties=properties,
        marker=marker,
    )


def _one_of(request: Request, name: str, allowed: tuple[str, ...]) -> str | None:
    text = request.query_one(name)
    if text is not None and text not in allowed:
        raise BadRequest(f"Invalid value for {name}: it must be one of {', '.join(allowed)}.")
    return text


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise BadRequest(f"Invalid value for {name}: it must be true or false.")
    return text.lower() == "true"


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BadRequest(f"Invalid value for {name}: it must be a whole number.")
    return int(text)


def _alternatives(name: str, text: str) -> tuple[Value, ...]:
    if name in ("min_disk", "min_ram"):
        return (_number(name, text),)
    if name == "protected":
        return (int(_boolean(name, text)),)
    operator, colon, rest = text.partition(":")
    if name in _SEVERAL and colon and operator == "in":
        try:
            values = next(csv.reader([rest], strict=True), [])
        except csv.Error as error:
            raise BadRequest(f"Invalid value for {name}: the list after in: cannot be read.") from error
        if not 1 <= len(values) <= IN_VALUES_MAX:
            raise BadRequest(f"Invalid value for {name}: in: takes 1 to {IN_VALUES_MAX} values.")
        return tuple(values)
    if name in _SEVERAL and colon and operator == "eq":
        return (rest,)
    return (text,)


def _time_range(name: str, text: str) -> tuple[str, str, int]:
    operator, colon, rest = text.partition(":")
    if not colon or operator not in _TIME_OPERATORS:
        operator, rest = "eq", text
    try:
        moment = datetime.fromisoformat(rest)
    except ValueError as error:
        raise BadRequest(f"Invalid value for {name}: it must be a time such as gte:2026-01-31T00:00:00Z.") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return name, operator, int(moment.timestamp())


def _sort(request: Request) -> tuple[tuple[str, bool], ...]:
    """Keys with direction (True: ascending), the last of them unique."""
    text = request.query_one("sort")
    keys, directions = request.query_all("sort_key"), request.query_all("sort_dir")
    if text is not None:
        if keys or directions:
            raise BadRequest("The old sort_key and sort_dir cannot be used together with sort.")
        parts = [part.strip().partition(":") for part in text.split(",") if part.strip()]
        keys, directions = [key for key, _, _ in parts], [direction or "desc" for _, _, direction in parts]
    elif len(directions) <= 1:
        directions = (directions or ["desc"]) * max(1, len(keys))
    keys = keys or ["created_at"]
    if len(directions) != len(keys):
        raise BadRequest("The number of sort directions must be one, or that of the sort keys.")
    for key, direction in zip(keys, directions, strict=True):
        if key not in SORT_KEYS or direction not in _DIRECTIONS:
            raise BadRequest(f"Invalid sort {key}:{direction}. Keys are {', '.join(SORT_KEYS)}; directions asc, desc.")
    chosen = {key: direction == "asc" for key, direction in zip(keys, directions, strict=True)}
    for key, _ in _DEFAULT_SORT:
        chosen.setdefault(key, next(iter(chosen.values())) if "created_at" not in chosen else chosen["created_at"])
    return tuple(chosen.items())
