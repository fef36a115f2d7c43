"""Filters and pages of the lists of the Identity API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from instar.http.answer import Answer, json_answer
from instar.http.context import RequestContext
from instar.http.paging import read_page
from instar.http.request import Request
from instar.identity.bootstrap import DEFAULT_DOMAIN
from instar.identity.local import LocalIdentity
from instar.identity.views import page_view
from instar.store.contract import Value
from instar.store.identity import Kind

R = TypeVar("R", bound=msgspec.Struct)


async def list_answer(
    identity: LocalIdentity,
    request: Request,
    kind: Kind[R],
    key: str,
    view: Callable[[Request, R], dict[str, Any]],
    filters: tuple[str, ...],
) -> Answer:
    """A page of one kind, filtered by equality on the columns of `filters` that the query has."""
    equals: dict[str, Value] = {}
    for name in filters:
        value = request.query_one(name)
        if value is not None:
            equals[name] = int(value.lower() not in ("0", "false", "no", "off")) if name == "enabled" else value
    page = read_page(request, identity.settings.api.list_limit_max)
    records = await identity.records.list(kind, equals, limit=page.limit, marker=page.marker)
    return json_answer(page_view(request, key, [view(request, record) for record in records], page))


def callers_domain(context: RequestContext) -> str:
    """The domain of what is made without one: that of the token's scope."""
    return context.domain_id or context.project_domain_id or DEFAULT_DOMAIN


def given_columns(changes: msgspec.Struct) -> dict[str, Value]:
    """The fields of a change that were given; a description that is cleared is empty text."""
    columns: dict[str, Value] = {}
    for name, value in msgspec.structs.asdict(changes).items():
        if value is not msgspec.UNSET and name not in ("options", "domain_id", "is_domain", "password", "tags"):
            columns[name] = "" if name == "description" and value is None else value
    return columns
