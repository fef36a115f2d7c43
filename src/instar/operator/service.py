"""The operators' API, below `/instar`: called by `instar server diagram`, `instar admin …` and the demo.

Made by the program: `operator_service(cloud, hosts)`. It only reads. The name of a host is for admins' eyes, as in the
Compute API: others get diagrams and steps without it.
"""

from __future__ import annotations

import asyncio

import msgspec

from instar.bus.contract import BusAway
from instar.errors import BadRequest, NotFound, Unavailable
from instar.http.answer import Answer, json_answer
from instar.http.app import Service
from instar.http.faults import compute_fault
from instar.http.policy import ADMIN, OPEN, READER, Policy, own_project
from instar.http.request import Request
from instar.http.routing import Route
from instar.lifecycle.audit import audit
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.diagram import DiagramFormat, diagram
from instar.model.instance import Instance
from instar.model.operation import Operation, Step
from instar.operator.views import DrainWish, drain_view, finding_line, host_line, operation_line
from instar.scheduling.host_table import HostTable
from instar.store.drains import drain_abort, drain_begin, drain_fetch, drain_moves_fetch
from instar.store.hosts import host_set_disabled
from instar.store.instances import instance_fetch, instances_of_host
from instar.store.operations import operations_of_instance, operations_unfinished, steps_fetch

PREFIX = "/instar"
POLICY = Policy(
    {
        "instar:versions": OPEN,
        "instar:audit": ADMIN,
        "instar:hosts": ADMIN,
        "instar:hosts:drain": ADMIN,
        "instar:operations": ADMIN,
        "instar:dead_letters": ADMIN,
        "instar:servers:operations": READER,
        "instar:servers:diagram": READER,
    }
)
BUS_RETRY_AFTER_S = 5
ID_SHOWN_MAX = 80  # of an id that was given and does not exist


def operator_service(cloud: Cloud, hosts: HostTable) -> Service:
    """The service for `http.build_app`. The store, the bus and the host table must be open by the first request."""
    operators = _Operators(cloud, hosts)
    return Service(
        name="instar",
        catalog_type="instar",
        prefix=PREFIX,
        routes=[
            Route("GET", "/", "instar:versions", operators.versions),
            Route("GET", "/v1/audit", "instar:audit", operators.audit),
            Route("GET", "/v1/hosts", "instar:hosts", operators.hosts),
            Route("GET", "/v1/hosts/{host}/drain", "instar:hosts:drain", operators.drain_status),
            Route("POST", "/v1/hosts/{host}/drain", "instar:hosts:drain", operators.drain),
            Route("DELETE", "/v1/hosts/{host}/drain", "instar:hosts:drain", operators.drain_abort),
            Route("GET", "/v1/dead-letters", "instar:dead_letters", operators.dead_letters),
            Route("DELETE", "/v1/dead-letters", "instar:dead_letters", operators.purge_dead_letters),
            Route("GET", "/v1/operations", "instar:operations", operators.operations_in_flight),
            Route("GET", "/v1/servers/{server_id}/operations", "instar:servers:operations", operators.operations),
            Route("GET", "/v1/servers/{server_id}/diagram", "instar:servers:diagram", operators.diagram),
        ],
        policy=POLICY,
        fault=compute_fault,
    )


class _Operators:
    def __init__(self, cloud: Cloud, hosts: HostTable) -> None:
        self._cloud = cloud
        self._hosts = hosts
        self._auditing = asyncio.Lock()  # an audit asks every host: one at a time is plenty

    async def versions(self, request: Request) -> Answer:
        href = f"{request.base_url}/v1/"
        return json_answer({"versions": [{"id": "v1", "status": "CURRENT", "links": [{"rel": "self", "href": href}]}]})

    async def audit(self, _request: Request) -> Answer:
        names = self._hosts.names()
        async with self._auditing:
            findings = await audit(self._cloud, names)
        return json_answer({"hosts": len(names), "findings": [finding_line(finding) for finding in findings]})

    async def hosts(self, _request: Request) -> Answer:
        lines = []
        for name in self._hosts.names():
            host = self._hosts.get(name)
            if host is not None:
                lines.append(host_line(host, is_up=self._hosts.is_up(name)))
        return json_answer({"hosts": lines})

    async def dead_letters(self, _request: Request) -> Answer:
        """Commands that nobody will do any more, oldest first. What they say is not shown: it may be secret."""
        try:
            found = await self._cloud.bus.dead_letters(self._cloud.settings.api.list_limit_max)
        except BusAway as error:
            raise Unavailable(retry_after_s=BUS_RETRY_AFTER_S) from error
        return json_answer({"dead_letters": found})

    async def purge_dead_letters(self, _request: Request) -> Answer:
        try:
            return json_answer({"purged": await self._cloud.bus.purge_dead_letters()})
        except BusAway as error:
            raise Unavailable(retry_after_s=BUS_RETRY_AFTER_S) from error

    async def drain(self, request: Request) -> Answer:
        """No instance comes to the host any more, and those that are there go. Raises NotFound, Conflict."""
        host = request.params["host"][:ID_SHOWN_MAX]
        wanted = await request.json(DrainWish)
        disabled = host_set_disabled(host, True, f"drain ({wanted.mode.value})")
        await self._cloud.store.write(disabled, *drain_begin(host, wanted.mode, wanted.concurrency))
        await self._hosts.refresh()
        return await self._drain_answer(host, 202)

    async def drain_status(self, request: Request) -> Answer:
        return await self._drain_answer(request.params["host"][:ID_SHOWN_MAX], 200)

    async def drain_abort(self, request: Request) -> Answer:
        """Live migrations in flight are aborted, other moves come to their end. The host stays disabled."""
        host = request.params["host"][:ID_SHOWN_MAX]
        await self._cloud.store.write(drain_abort(host))
        return await self._drain_answer(host, 202)

    async def _drain_answer(self, host: str, status: int) -> Answer:
        store = self._cloud.store
        drain, moves = await drain_fetch(store, host), await drain_moves_fetch(store, host)
        on_host = {instance.id for instance in await instances_of_host(store, host)}
        return json_answer(drain_view(drain, moves, on_host, self._cloud.settings.api.list_limit_max), status=status)

    async def operations_in_flight(self, request: Request) -> Answer:
        """Of all instances, oldest first; at most as many as a list may have."""
        limit = self._cloud.settings.api.list_limit_max
        found = await operations_unfinished(self._cloud.store)
        lines = [operation_line(operation, [], hosts_shown=True) for operation in found[:limit]]
        return json_answer({"operations": lines, "total": len(found)})

    async def operations(self, request: Request) -> Answer:
        """Of one server, newest first, each with its steps."""
        instance = await self._instance(request)
        found = (await operations_of_instance(self._cloud.store, instance.id))[: self._cloud.settings.api.list_limit_max]
        shown = request.context.is_admin
        lines = [operation_line(one, await steps_fetch(self._cloud.store, one.id), hosts_shown=shown) for one in found]
        return json_answer({"operations": lines})

    async def diagram(self, request: Request) -> Answer:
        """Of the operation of `request_id`; without one, of the newest. `format` is text or mermaid."""
        wanted = request.query_one("format") or DiagramFormat.TEXT.value
        if wanted not in {one.value for one in DiagramFormat}:
            raise BadRequest("The query parameter format must be text or mermaid.")
        operation, steps = await self._operation(request)
        if not request.context.is_admin:
            steps = [msgspec.structs.replace(step, host=None) for step in steps]
        drawn = diagram(operation, steps, DiagramFormat(wanted))
        return Answer(200, drawn.encode(), b"text/plain; charset=utf-8")

    async def _operation(self, request: Request) -> tuple[Operation, list[Step]]:
        instance = await self._instance(request)
        request_id = request.query_one("request_id")
        for operation in await operations_of_instance(self._cloud.store, instance.id):
            if request_id in (None, operation.request_id):
                return operation, await steps_fetch(self._cloud.store, operation.id)
        raise NotFound(kind="Operation", id=(request_id or "")[:ID_SHOWN_MAX])

    async def _instance(self, request: Request) -> Instance:
        """The server of the path, deleted ones included. Raises NotFound, also for one of another project."""
        server_id = request.params["server_id"][:ID_SHOWN_MAX]
        instance = await instance_fetch(self._cloud.store, server_id)
        own_project(request.context, instance.project_id, "Instance", server_id)
        return instance
