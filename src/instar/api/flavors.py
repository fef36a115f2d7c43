"""Flavors: list, show, and for admins make, describe and delete."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from instar.api.body import INTEGER_MAX, Name, Positive, since
from instar.api.resource import (
    ApiRoute,
    Compute,
    add_next,
    boolean,
    integer,
    links,
    page_of,
    read_body,
    refuse_unknown,
)
from instar.api.servers.bodies import Record
from instar.errors import BadRequest, Conflict
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.model.instance import Flavor
from instar.store.flavors import (
    SORTS,
    FlavorQuery,
    flavor_access_add,
    flavor_delete,
    flavor_fetch,
    flavor_insert,
    flavor_list,
    flavor_replace,
    flavor_sort_value,
)

DESCRIPTION_SINCE, EXTRA_SPECS_SINCE, SWAP_ZERO_SINCE = 55, 61, 75
DESCRIPTION_MAX = 65_535
ATTEMPTS_MAX = 10
_NAME = "os_compute_api:os-flavor-manage:"
_EPHEMERAL = "OS-FLV-EXT-DATA:ephemeral"
_PARAMETERS = frozenset({"limit", "marker", "is_public", "minRam", "minDisk", "sort_key", "sort_dir"})

FlavorId = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9._ \-]*[a-zA-Z0-9._\-]\Z")]
Size = Annotated[int, Meta(ge=0, le=INTEGER_MAX)]
Text = Annotated[str, Meta(max_length=DESCRIPTION_MAX)]


class NewFlavor(Record, frozen=True):
    name: Name
    ram: Positive
    vcpus: Positive
    disk: Size
    id: FlavorId | int | None = None
    ephemeral: Size = msgspec.field(name=_EPHEMERAL, default=0)
    swap: Size = 0
    rxtx_factor: Annotated[float, Meta(gt=0, le=3.4e38)] = 1.0
    is_public: bool = msgspec.field(name="os-flavor-access:is_public", default=True)
    description: Annotated[Text | UnsetType | None, since(DESCRIPTION_SINCE)] = UNSET


class CreateFlavor(Record, frozen=True):
    flavor: NewFlavor


class FlavorChanges(Record, frozen=True):
    description: Text | None


class UpdateFlavor(Record, frozen=True):
    flavor: FlavorChanges


def flavor_view(flavor: Flavor, request: Request) -> dict[str, Any]:
    version: int = request.microversion
    swap: int | str = flavor.swap_mib
    if not swap and version < SWAP_ZERO_SINCE:
        swap = ""
    view: dict[str, Any] = {
        "id": flavor.id,
        "name": flavor.name,
        "ram": flavor.memory_mib,
        "disk": flavor.root_gib,
        "swap": swap,
        _EPHEMERAL: flavor.ephemeral_gib,
        "OS-FLV-DISABLED:disabled": flavor.disabled,
        "vcpus": flavor.vcpus,
        "os-flavor-access:is_public": flavor.is_public,
        "rxtx_factor": flavor.rxtx_factor,
        "links": links(request, "flavors", flavor.id),
    }
    if version >= DESCRIPTION_SINCE:
        view["description"] = flavor.description
    if version >= EXTRA_SPECS_SINCE:
        view["extra_specs"] = flavor.extra_specs
    return view


async def visible_flavor(compute: Compute, context: RequestContext, flavor_id: str) -> Flavor:
    """Raises NotFound, also for a private flavor of others."""
    return await flavor_fetch(compute.store, flavor_id, visible_to=None if context.is_admin else context.project_id)


async def change_flavor(compute: Compute, flavor_id: str, **changes: Any) -> Flavor:
    """The flavor with other fields; nobody's change in between is lost. Raises NotFound."""
    for _ in range(ATTEMPTS_MAX):
        was = await flavor_fetch(compute.store, flavor_id, visible_to=None)
        values = {name: change(was) if callable(change) else change for name, change in changes.items()}
        flavor = msgspec.structs.replace(was, **values)
        if await flavor_replace(compute.store, flavor, was):
            return flavor
    raise Conflict(f"Flavor {flavor_id} is being changed by others.")


class Flavors:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        return [
            ApiRoute("GET", "/flavors", "os_compute_api:flavors", self.index),
            ApiRoute("GET", "/flavors/detail", "os_compute_api:flavors", self.detail),
            ApiRoute("GET", "/flavors/{flavor_id}", "os_compute_api:flavors", self.show),
            ApiRoute("POST", "/flavors", _NAME + "create", self.create),
            ApiRoute("PUT", "/flavors/{flavor_id}", _NAME + "update", self.update, since=DESCRIPTION_SINCE),
            ApiRoute("DELETE", "/flavors/{flavor_id}", _NAME + "delete", self.delete),
        ]

    async def index(self, request: Request) -> Answer:
        flavors, marker = await self._page(request)
        found = []
        for flavor in flavors:
            view: dict[str, Any] = {"id": flavor.id, "name": flavor.name, "links": links(request, "flavors", flavor.id)}
            if request.microversion >= DESCRIPTION_SINCE:
                view["description"] = flavor.description
            found.append(view)
        return json_answer(add_next({"flavors": found}, "flavors", request, marker))

    async def detail(self, request: Request) -> Answer:
        flavors, marker = await self._page(request)
        found = [flavor_view(flavor, request) for flavor in flavors]
        return json_answer(add_next({"flavors": found}, "flavors", request, marker))

    async def show(self, request: Request) -> Answer:
        flavor = await visible_flavor(self._compute, request.context, request.params["flavor_id"])
        return json_answer({"flavor": flavor_view(flavor, request)})

    async def create(self, request: Request) -> Answer:
        new = (await read_body(request, CreateFlavor)).flavor
        flavor = Flavor(
            id=_flavor_id(new.id),
            name=new.name,
            vcpus=new.vcpus,
            memory_mib=new.ram,
            root_gib=new.disk,
            ephemeral_gib=new.ephemeral,
            swap_mib=new.swap,
            rxtx_factor=new.rxtx_factor,
            is_public=new.is_public,
            description=None if isinstance(new.description, UnsetType) else new.description,
        )
        await flavor_insert(self._compute.store, flavor)
        if not flavor.is_public:
            await flavor_access_add(self._compute.store, flavor.id, request.context.project_id)
        return json_answer({"flavor": flavor_view(flavor, request)})

    async def update(self, request: Request) -> Answer:
        changes = (await read_body(request, UpdateFlavor)).flavor
        flavor = await change_flavor(self._compute, request.params["flavor_id"], description=lambda _: changes.description)
        return json_answer({"flavor": flavor_view(flavor, request)})

    async def delete(self, request: Request) -> Answer:
        await flavor_delete(self._compute.store, request.params["flavor_id"])
        return empty_answer(202)

    async def _page(self, request: Request) -> tuple[list[Flavor], str | None]:
        if request.microversion >= 75:
            refuse_unknown(request, _PARAMETERS)
        context = request.context
        page = page_of(request, self._compute)
        key, direction = request.query_one("sort_key") or "flavorid", request.query_one("sort_dir") or "asc"
        if key not in SORTS or direction not in ("asc", "desc"):
            raise BadRequest("Invalid input for query parameters sort_key or sort_dir.")
        visible_to, public = _visibility(request.query_one("is_public"), context)
        after = None
        if page.marker is not None:
            after = await flavor_sort_value(self._compute.store, page.marker, key)
            if after is None:
                raise BadRequest(f"marker [{page.marker}] not found")
        query = FlavorQuery(
            visible_to=visible_to,
            public=public,
            disabled=None if context.is_admin else False,
            min_memory_mib=integer("minRam", request.query_one("minRam") or "0"),
            min_root_gib=integer("minDisk", request.query_one("minDisk") or "0"),
            order=(key, direction == "desc"),
            after=after,
            limit=page.limit,
        )
        found = await flavor_list(self._compute.store, query)
        return found, found[-1].id if len(found) == page.limit else None


def _flavor_id(given: str | int | None) -> str:
    # `auto` is what the command line sends for "make one up".
    return str(uuid.uuid4()) if given is None or given == "auto" else str(given)


def _visibility(is_public: str | None, context: RequestContext) -> tuple[str | None, bool | None]:
    """(project whose flavors, only public or private ones). Admins see the public ones unless they ask for more."""
    if not context.is_admin:
        return context.project_id, None
    if is_public is None:
        # Without the parameter an admin gets what the project may use, like everybody.
        return context.project_id, None
    if is_public.lower() == "none":
        return None, None
    return None, boolean("is_public", is_public)
