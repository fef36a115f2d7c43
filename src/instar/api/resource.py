"""What every resource of the Compute API is built from: the services it calls, versioned routes, helpers for queries.

A resource module has a class that is made with `Compute` and lists its routes; `service.py` puts them together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from instar.api import body
from instar.api.host_directory import HostDirectory
from instar.config import Settings
from instar.errors import BadRequest, UnsupportedMedia
from instar.http.answer import Answer
from instar.http.faults import RouteNotFound
from instar.http.paging import Page, next_links, read_page
from instar.http.request import Request
from instar.http.routing import Handler, Route
from instar.identity.contract import IdentityService
from instar.images.contract import ImageService
from instar.lifecycle.door import Lifecycle
from instar.networks.contract import NetworkService
from instar.store.contract import Store
from instar.volumes.contract import VolumeService

S = TypeVar("S", bound=msgspec.Struct)
VERSION_PATH = "/v2.1"


class Compute(NamedTuple):
    """What the Compute API leans on."""

    store: Store
    settings: Settings
    lifecycle: Lifecycle
    images: ImageService
    networks: NetworkService
    identity: IdentityService
    hosts: HostDirectory
    volumes: VolumeService


class ApiRoute(NamedTuple):
    """A route below `/v2.1` that exists from microversion 2.`since` to 2.`until` (None: still does)."""

    method: str
    path: str
    policy: str
    handler: Handler
    since: int = 1
    until: int | None = None


def http_routes(routes: Iterable[ApiRoute]) -> list[Route]:
    """Each route as the HTTP room knows it, with and without the project id in the path (both forms are the API's)."""
    found = []
    for route in routes:
        handler = partial(_serve, route)
        found.append(Route(route.method, VERSION_PATH + route.path, route.policy, handler))
        found.append(Route(route.method, f"{VERSION_PATH}/{{url_project_id}}{route.path}", route.policy, handler))
    return found


async def _serve(route: ApiRoute, request: Request) -> Answer:
    version: int = request.microversion
    if version < route.since or (route.until is not None and version > route.until):
        raise RouteNotFound()
    project_id = request.params.get("url_project_id")
    if project_id is not None and project_id != request.context.project_id:
        raise BadRequest("Malformed request url: its project_id is not the project_id of the token.")
    return await route.handler(request)


async def read_body(request: Request, record: type[S]) -> S:
    """The request's JSON body as `record`, at the request's microversion. Raises BadRequest, UnsupportedMedia."""
    content_type = request.header(b"content-type")
    if content_type and not content_type.startswith(("application/json", "text/plain")):
        raise UnsupportedMedia(f"Unsupported Content-Type {content_type[:80]!r}: send application/json.")
    return body.decode(await request.body(), record, request.microversion)


def service_url(request: Request) -> str:
    """Address of the versioned API, for `self` links."""
    return request.base_url + VERSION_PATH


def links(request: Request, collection: str, record_id: str) -> list[dict[str, str]]:
    base = request.base_url
    return [
        {"rel": "self", "href": f"{base}{VERSION_PATH}/{collection}/{record_id}"},
        {"rel": "bookmark", "href": f"{base}/{collection}/{record_id}"},
    ]


# --- queries --------------------------------------------------------------------------------------------------------


def page_of(request: Request, compute: Compute) -> Page:
    return read_page(request, compute.settings.api.list_limit_max)


def add_next(found: dict[str, Any], name: str, request: Request, marker: str | None) -> dict[str, Any]:
    """`<name>_links` to the page after `marker`, where there is one."""
    if marker is not None:
        found[f"{name}_links"] = next_links(request, marker)
    return found


def refuse_unknown(request: Request, known: frozenset[str]) -> None:
    """Raises BadRequest for a query parameter that is not in `known`."""
    for name, _ in request.query:
        if name not in known:
            raise BadRequest(f"Invalid query parameters: additional properties are not allowed ({name[:80]!r}).")


_TRUE = frozenset({"1", "t", "true", "on", "y", "yes"})
_FALSE = frozenset({"0", "f", "false", "off", "n", "no"})


def boolean(name: str, text: str) -> bool:
    """A truth value of a query. Raises BadRequest."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise BadRequest(f"Invalid value for {name}: {text[:40]!r} is not a boolean.")


def time_us(name: str, text: str) -> int:
    """An ISO 8601 time of a query (UTC where it names no zone), in microseconds. Raises BadRequest."""
    # A plus sign that was not escaped arrives as a space.
    candidate = re.sub(r" (\d\d:?\d\d)$", r"+\1", text.strip())
    try:
        moment = datetime.fromisoformat(candidate)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return int(moment.timestamp() * 1_000_000)
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"Invalid input for query parameter {name}: {text[:64]!r} is not an ISO 8601 time.") from error


def integer(name: str, text: str, *, least: int = 0) -> int:
    """Raises BadRequest for text that is no integer of at least `least`."""
    if not re.fullmatch(r"-?[0-9]{1,10}", text) or int(text) < least:
        raise BadRequest(f"Invalid input for query parameter {name}: {text[:40]!r} is not an integer >= {least}.")
    return int(text)


def at_version(version: int, table: Mapping[str, int]) -> frozenset[str]:
    """Names of a table (name → microversion that brought it) that exist at a version."""
    return frozenset(name for name, first in table.items() if version >= first)
