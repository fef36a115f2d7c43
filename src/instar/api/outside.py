"""What other services and old clients ask for: external events, and the list of extensions."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from instar.api.body import Uuid
from instar.api.resource import ApiRoute, Compute, read_body
from instar.api.servers.bodies import Record
from instar.errors import BadRequest, NotFound
from instar.http.answer import Answer, json_answer
from instar.http.request import Request
from instar.store.instance_queries import instance_row

EVENTS_MAX = 500
# Event → microversion that brought it.
EVENTS = {
    "network-changed": 1, "network-vif-plugged": 1, "network-vif-unplugged": 1, "network-vif-deleted": 1,
    "volume-extended": 51, "power-update": 76, "accelerator-request-bound": 82, "volume-reimaged": 93,
}  # fmt: skip
EXTENSIONS = (
    "os-admin-actions", "os-admin-password", "os-aggregates", "os-attach-interfaces", "os-availability-zone",
    "os-console-output", "os-create-backup", "os-deferred-delete", "os-evacuate", "os-extended-volumes",
    "os-flavor-access", "os-flavor-extra-specs", "os-flavor-manage", "os-hypervisors", "os-instance-actions",
    "os-keypairs", "os-lock-server", "os-migrate-server", "os-migrations", "os-pause-server", "os-quota-class-sets",
    "os-quota-sets", "os-remote-consoles", "os-rescue", "os-security-groups", "os-server-diagnostics",
    "os-server-external-events", "os-server-groups", "os-services", "os-shelve", "os-simple-tenant-usage",
    "os-suspend-server", "server-metadata",
)  # fmt: skip


class Event(Record, frozen=True):
    name: str
    server_uuid: Uuid
    status: Literal["failed", "completed", "in-progress"] = "completed"
    tag: str | None = None


class Events(Record, frozen=True):
    events: Annotated[list[Event], Meta(min_length=1, max_length=EVENTS_MAX)]


class ExternalEvents(msgspec.Struct, frozen=True):
    """`/os-server-external-events`. Our networks are there before a guest starts, so nothing waits for these: each event
    is checked and acknowledged, as services expect."""

    compute: Compute

    def routes(self) -> list[ApiRoute]:
        name = "os_compute_api:os-server-external-events:create"
        return [ApiRoute("POST", "/os-server-external-events", name, self.create)]

    async def create(self, request: Request) -> Answer:
        events = (await read_body(request, Events)).events
        for event in events:
            if EVENTS.get(event.name, 10_000) > request.microversion:
                known = sorted(name for name, first in EVENTS.items() if first <= request.microversion)
                raise BadRequest(f"Invalid input: events.name: {event.name[:80]!r} is not one of {known}")
        rows = await asyncio.gather(*(instance_row(self.compute.store, event.server_uuid) for event in events))
        answers = []
        for event, row in zip(events, rows, strict=True):
            code = 404 if row is None or row["deleted"] else 422 if row["host"] is None else 200
            view: dict[str, Any] = {
                "name": event.name, "server_uuid": event.server_uuid,
                "status": event.status if code == 200 else "failed", "code": code,
            }  # fmt: skip
            answers.append(view | ({"tag": event.tag} if event.tag is not None else {}))
        codes = {one["code"] for one in answers}
        if codes == {404}:
            raise NotFound("No instances found for any event")
        return json_answer({"events": answers}, 200 if codes == {200} else 207)


class Extensions:
    """`/extensions`: names of what the API has besides servers and flavors, for clients from before microversions."""

    def routes(self) -> list[ApiRoute]:
        name = "os_compute_api:extensions"
        return [
            ApiRoute("GET", "/extensions", name, self.index),
            ApiRoute("GET", "/extensions/{alias}", name, self.show),
        ]

    async def index(self, request: Request) -> Answer:
        return json_answer({"extensions": [_extension(alias) for alias in EXTENSIONS]})

    async def show(self, request: Request) -> Answer:
        alias = request.params["alias"]
        if alias not in EXTENSIONS:
            raise NotFound(f"Extension {alias[:80]} could not be found.")
        return json_answer({"extension": _extension(alias)})


def _extension(alias: str) -> dict[str, Any]:
    name = "".join(part.capitalize() for part in alias.removeprefix("os-").split("-"))
    namespace = "http://docs.openstack.org/compute/ext/fake_xml"  # what every answer of this API has had for years
    return {
        "alias": alias, "name": name, "description": "", "links": [], "namespace": namespace,
        "updated": "2014-12-03T00:00:00Z",
    }  # fmt: skip
