"""`/servers/{id}/os-instance-actions`: operations and their journals, as users read them. There is no second log."""

from __future__ import annotations

from typing import Any

import msgspec

from instar.api.resource import ApiRoute, Compute, add_next, page_of, refuse_unknown, time_us
from instar.api.servers.view import host_id
from instar.clock import iso_us
from instar.errors import BadRequest, NotFound
from instar.http.answer import Answer, json_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.model.operation import Operation, RecordedError, Step, operation_from_row
from instar.store.contract import Row
from instar.store.instance_queries import instance_row, operation_of_request, operations_page
from instar.store.operations import steps_fetch

PAGING_SINCE, UPDATED_SINCE, CHANGES_BEFORE_SINCE = 58, 58, 66
DELETED_SINCE = 21  # from here on actions of deleted servers are shown
EVENTS_FOR_ALL_SINCE, HOST_SINCE, DETAILS_SINCE = 51, 62, 84
_NAME = "os_compute_api:os-instance-actions:"
_decode_error = msgspec.msgpack.Decoder(RecordedError).decode


class InstanceActions:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        path = "/servers/{server_id}/os-instance-actions"
        return [
            ApiRoute("GET", path, _NAME + "list", self.index),
            ApiRoute("GET", path + "/{request_id}", _NAME + "show", self.show),
        ]

    async def _server(self, request: Request) -> Row:
        """The server's row, deleted ones included from 2.21 on. Raises NotFound."""
        server_id, context = request.params["server_id"], request.context
        row = await instance_row(self._compute.store, server_id)
        if (
            row is None
            or (row["project_id"] != context.project_id and not context.is_admin)
            or (row["deleted"] and request.microversion < DELETED_SINCE)
        ):
            raise NotFound(f"Instance {server_id[:80]} could not be found.")
        return row

    async def index(self, request: Request) -> Answer:
        server = await self._server(request)
        version: int = request.microversion
        limit, marker, since, before = self._compute.settings.api.list_limit_max, None, None, None
        if version >= PAGING_SINCE:
            known = {"limit", "marker", "changes-since"} | (
                {"changes-before"} if version >= CHANGES_BEFORE_SINCE else set()
            )
            refuse_unknown(request, frozenset(known))
            limit, marker = page_of(request, self._compute)
            since, before = _time(request, "changes-since"), _time(request, "changes-before")
            if since is not None and before is not None and since > before:
                raise BadRequest("The value of changes-since must be less than or equal to changes-before.")
            if marker is not None and await operation_of_request(self._compute.store, server["id"], marker) is None:
                raise BadRequest(f"marker [{marker}] not found")
        rows = await operations_page(
            self._compute.store, server["id"], limit=limit, marker=marker, since_us=since, before_us=before
        )
        actions = [_action(operation_from_row(row), version) for row in rows]  # type: ignore[arg-type]
        found: dict[str, Any] = {"instanceActions": actions}
        if version >= PAGING_SINCE:
            full = len(rows) == limit
            # The list is called instanceActions, the link to its next page just links.
            links = add_next({}, "x", request, rows[-1]["request_id"] if full and rows else None)
            if links:
                found["links"] = links["x_links"]
        return json_answer(found)

    async def show(self, request: Request) -> Answer:
        server = await self._server(request)
        request_id, version = request.params["request_id"], request.microversion
        row = await operation_of_request(self._compute.store, server["id"], request_id)
        if row is None:
            raise NotFound(f"Action for request_id {request_id[:80]} on instance {server['id']} not found")
        operation = operation_from_row(row)  # type: ignore[arg-type]
        view = _action(operation, version)
        if version >= EVENTS_FOR_ALL_SINCE or request.context.is_admin:
            steps = await steps_fetch(self._compute.store, operation.id)
            view["events"] = [_event(step, server["project_id"], version, request.context) for step in reversed(steps)]
        return json_answer({"instanceAction": view})


def _time(request: Request, name: str) -> int | None:
    text = request.query_one(name)
    return None if text is None else time_us(name, text)


def _action(operation: Operation, version: int) -> dict[str, Any]:
    view: dict[str, Any] = {
        "action": operation.action,
        "instance_uuid": operation.instance_id,
        "request_id": operation.request_id,
        "user_id": operation.user_id,
        "project_id": operation.project_id,
        "start_time": iso_us(operation.started_at),
        # The reason is the fault's, and in the events' details: it may name what is not for users, such as a host.
        "message": "Error" if operation.result == "Error" else operation.message,
    }
    if version >= UPDATED_SINCE:
        view["updated_at"] = iso_us(operation.updated_at)
    return view


def _event(step: Step, project_id: str, version: int, context: RequestContext) -> dict[str, Any]:
    view: dict[str, Any] = {
        "event": step.name,
        "start_time": iso_us(step.started_at),
        "finish_time": iso_us(step.finished_at) if step.finished_at is not None else None,
        "result": step.result,
    }
    if context.is_admin or version < EVENTS_FOR_ALL_SINCE:
        view["traceback"] = step.traceback
    if version >= HOST_SINCE:
        if context.is_admin:
            view["host"] = step.host
        view["hostId"] = host_id(project_id, step.host)
    if version >= DETAILS_SINCE and context.is_admin:
        view["details"] = _decode_error(step.error).message if step.error else None
    return view
