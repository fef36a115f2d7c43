"""Lists of the Network API: filters on any shown field, order, pages with links, and a choice of fields."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import msgspec

from instar.errors import BadRequest
from instar.http.answer import Answer, json_answer
from instar.http.paging import read_page
from instar.http.request import Request
from instar.networks.views import View
from instar.store.contract import Store
from instar.store.network_records import Table, record_list

R = TypeVar("R", bound=msgspec.Struct)
Decorate = Callable[[list[View]], Awaitable[list[View]]]

_CONTROL = frozenset({"limit", "marker", "page_reverse", "sort_key", "sort_dir", "fields", "verbose"})
_TAG_FILTERS = frozenset({"tags", "tags-any", "not-tags", "not-tags-any"})
# Filters that the database can answer itself: name in the query → column.
_COLUMNS = {
    "id": "id", "name": "name", "network_id": "network_id", "device_id": "device_id", "mac_address": "mac_address",
    "project_id": "project_id", "tenant_id": "project_id", "security_group_id": "group_id",
}  # fmt: skip
_YES = ("true", "1", "yes", "on", "t", "y")
_NO = ("false", "0", "no", "off", "f", "n")


class Kind(NamedTuple):
    """`key` is the collection's name in the body, `sample` a view, which tells the fields that can be asked for."""

    key: str
    sample: View


async def list_answer(
    request: Request, store: Store, table: Table[R], kind: Kind, view: Callable[[R], View], *, limit_max: int,
    decorate: Decorate | None = None,
) -> Answer:  # fmt: skip
    """A page of what the caller may see. `decorate` adds to the views of the page what costs another read."""
    page = read_page(request, limit_max)
    context = request.context
    filters = _filters(request, kind)
    equal = {
        _COLUMNS[name]: values for name, values in filters.items() if _COLUMNS.get(name) in table.columns and name != "tags"
    }  # fmt: skip
    records = await record_list(store, table, viewer=None if context.is_admin else context.project_id, equal=equal)
    views = [shown for shown in map(view, records) if _matches(shown, filters)]
    _sort(request, views, kind)
    chosen, links = _page(request, views, page.limit, page.marker)
    if decorate is not None:
        chosen = await decorate(chosen)
    body: dict[str, Any] = {kind.key: [chosen_fields(request, one) for one in chosen]}
    if links:
        body[f"{kind.key}_links"] = links
    return json_answer(body)


def chosen_fields(request: Request, view: View) -> View:
    """The fields that the query asks for; all when it names none."""
    names = {name for text in request.query_all("fields") for name in text.split(",")}
    return {name: value for name, value in view.items() if name in names} if names else view


def _filters(request: Request, kind: Kind) -> dict[str, list[str]]:
    """Raises BadRequest for a parameter that is no field: a filter that is ignored would return too much."""
    filters: dict[str, list[str]] = {}
    for name, text in request.query:
        if name in _CONTROL:
            continue
        if name not in kind.sample and name not in _TAG_FILTERS:
            raise BadRequest(f"['{name[:64]}'] is invalid attribute for filtering")
        filters.setdefault(name, []).append(text)
    return filters


def _matches(view: View, filters: dict[str, list[str]]) -> bool:
    return all(
        _tags_match(name, view["tags"], values) if name in _TAG_FILTERS and "tags" in view
        else _fixed_ips_match(view["fixed_ips"], values) if name == "fixed_ips"
        else any(_equal(view.get(name), text) for text in values)
        for name, values in filters.items()
    )  # fmt: skip


def _equal(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        if text.lower() not in (*_YES, *_NO):
            raise BadRequest(f"'{text[:40]}' is not a valid boolean value")
        return value == (text.lower() in _YES)
    if value is None:
        return text in ("", "None")
    if isinstance(value, list | tuple):
        return text in value
    return str(value) == text


def _tags_match(name: str, tags: Sequence[str], values: list[str]) -> bool:
    wanted = {tag for text in values for tag in text.split(",")}
    found = bool(wanted.intersection(tags)) if name.endswith("-any") else wanted.issubset(tags)
    return found != name.startswith("not-")


def _fixed_ips_match(fixed_ips: list[dict[str, str]], values: list[str]) -> bool:
    """`subnet_id=…`, `ip_address=…` or `ip_address_substr=…`: one of each kind that is asked for."""
    asked: dict[str, list[str]] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or name not in ("subnet_id", "ip_address", "ip_address_substr"):
            raise BadRequest("Invalid input for fixed_ips: it must be subnet_id=…, ip_address=… or ip_address_substr=….")
        asked.setdefault(name, []).append(value)
    return all(
        any(
            value in one["ip_address"] if name == "ip_address_substr" else one[name] == value
            for one in fixed_ips
            for value in wanted
        )
        for name, wanted in asked.items()
    )


def _sort(request: Request, views: list[View], kind: Kind) -> None:
    """Oldest first, unless keys are given. Raises BadRequest for a key that is no plain field."""
    keys, directions = request.query_all("sort_key"), request.query_all("sort_dir")
    if len(keys) != len(directions) and directions:
        raise BadRequest("The number of sort_keys and sort_dirs must be same")
    for key, direction in reversed(list(zip(keys, directions or ["asc"] * len(keys), strict=True))):
        if key not in kind.sample or isinstance(kind.sample[key], list | tuple | dict):
            raise BadRequest(f"'{key[:64]}' is invalid attribute for sort key")
        if direction not in ("asc", "desc"):
            raise BadRequest("sort_dir must be asc or desc")
        views.sort(key=lambda one, key=key: (one[key] is not None, one[key]), reverse=direction == "desc")  # type: ignore[misc]


def _page(request: Request, views: list[View], limit: int, marker: str | None) -> tuple[list[View], list[dict[str, str]]]:
    """The records after the marker (before it with `page_reverse`), and the links to what lies on both sides."""
    backwards = (request.query_one("page_reverse") or "").lower() in _YES
    start, end = 0, len(views)
    if marker is not None:
        position = next((index for index, one in enumerate(views) if one["id"] == marker), None)
        if position is None:
            raise BadRequest("The marker could not be found.")
        start, end = (0, position) if backwards else (position + 1, len(views))
    if backwards:
        start = max(start, end - limit)
    else:
        end = min(end, start + limit)
    chosen = views[start:end]
    links = []
    if chosen and end < len(views):
        links.append(_link(request, "next", chosen[-1]["id"]))
    if chosen and start > 0:
        links.append(_link(request, "previous", chosen[0]["id"]))
    return chosen, links


def _link(request: Request, rel: str, marker: str) -> dict[str, str]:
    kept = [(key, value) for key, value in request.query if key not in ("marker", "page_reverse")]
    kept.append(("marker", marker))
    if rel == "previous":
        kept.append(("page_reverse", "True"))
    return {"rel": rel, "href": f"{request.origin}{request.path}?{urlencode(kept)}"}
