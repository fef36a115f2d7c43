"""`/os-simple-tenant-usage`: what servers a project had in a period, in hours. Times without a zone are UTC."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from instar.api.resource import ApiRoute, Compute, add_next, page_of, refuse_unknown, time_us
from instar.errors import BadRequest, Forbidden
from instar.http.answer import Answer, json_answer
from instar.http.request import Request
from instar.model.instance import InstanceSpec
from instar.model.states import VmState, status_of
from instar.store.contract import Row
from instar.store.instance_queries import instance_usages

PAGING_SINCE = 40
HOUR_US = 3_600_000_000
FOUR_WEEKS_US = 28 * 24 * HOUR_US
_NAME = "os_compute_api:os-simple-tenant-usage:"
_decode_spec = msgspec.msgpack.Decoder(InstanceSpec).decode


class Usage(msgspec.Struct, frozen=True):
    compute: Compute

    def routes(self) -> list[ApiRoute]:
        path = "/os-simple-tenant-usage"
        return [
            ApiRoute("GET", path, _NAME + "list", self.index),
            ApiRoute("GET", path + "/{tenant_id}", _NAME + "show", self.show),
        ]

    async def index(self, request: Request) -> Answer:
        detailed = request.query_one("detailed") == "1"
        start, end, rows, marker = await self._read(request, None)
        projects: dict[str, list[Row]] = {}
        for row in rows:
            projects.setdefault(row["project_id"], []).append(row)
        found: dict[str, Any] = {
            "tenant_usages": [
                _usage(project_id, mine, start, end, detailed=detailed) for project_id, mine in projects.items()
            ]
        }
        return json_answer(add_next(found, "tenant_usages", request, marker))

    async def show(self, request: Request) -> Answer:
        tenant_id, context = request.params["tenant_id"], request.context
        if tenant_id != context.project_id and not context.is_admin:
            raise Forbidden(action=_NAME + "show")
        start, end, rows, marker = await self._read(request, tenant_id)
        found: dict[str, Any] = {"tenant_usage": _usage(tenant_id, rows, start, end, detailed=True) if rows else {}}
        return json_answer(add_next(found, "tenant_usage", request, marker))

    async def _read(self, request: Request, project_id: str | None) -> tuple[int, int, Sequence[Row], str | None]:
        """Start and end of the period, its servers (of the page that is asked for), and the next page's marker."""
        if request.microversion >= 75:
            refuse_unknown(request, frozenset({"start", "end", "detailed", "limit", "marker"}))
        now = time.time_ns() // 1000
        given_start, given_end = request.query_one("start"), request.query_one("end")
        end = time_us("end", given_end) if given_end else now
        start = time_us("start", given_start) if given_start else end - FOUR_WEEKS_US
        if start >= end:
            raise BadRequest("Invalid start time. The start time cannot occur after the end time.")
        rows = await instance_usages(self.compute.store, start_us=start, end_us=end, project_id=project_id)
        if request.microversion < PAGING_SINCE:
            return start, end, rows, None
        page = page_of(request, self.compute)
        first = 0
        if page.marker is not None:
            ids = [row["id"] for row in rows]
            if page.marker not in ids:
                raise BadRequest(f"marker [{page.marker}] not found")
            first = ids.index(page.marker) + 1
        shown = rows[first : first + page.limit]
        return start, end, shown, shown[-1]["id"] if len(shown) == page.limit else None


def _iso(moment_us: int) -> str:
    return datetime.fromtimestamp(moment_us / 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")


def _usage(project_id: str, rows: Sequence[Row], start: int, end: int, *, detailed: bool) -> dict[str, Any]:
    servers = [_server_usage(row, start, end) for row in rows]
    view: dict[str, Any] = {
        "tenant_id": project_id,
        "start": _iso(start),
        "stop": _iso(end),
        "total_hours": sum(one["hours"] for one in servers),
        "total_vcpus_usage": sum(one["hours"] * one["vcpus"] for one in servers),
        "total_memory_mb_usage": sum(one["hours"] * one["memory_mb"] for one in servers),
        "total_local_gb_usage": sum(one["hours"] * one["local_gb"] for one in servers),
    }
    if detailed:
        view["server_usages"] = servers
    return view


def _server_usage(row: Row, start: int, end: int) -> dict[str, Any]:
    ended, began = row["terminated_at"], row["launched_at"]
    until = min(end, ended) if ended is not None else end
    hours = max(0, until - max(start, began)) / HOUR_US
    vm_state = VmState(row["vm_state"])
    uptime_until = ended if ended is not None else end
    return {
        "instance_id": row["id"],
        "name": row["name"],
        "hours": hours,
        "flavor": _decode_spec(row["spec"]).flavor.name,
        "vcpus": row["vcpus"],
        "memory_mb": row["memory_mib"],
        "local_gb": row["disk_gib"],
        "tenant_id": row["project_id"],
        "started_at": _iso(began),
        "ended_at": _iso(ended) if ended is not None else None,
        "state": "terminated" if ended is not None else status_of(vm_state, None).lower(),
        "uptime": max(0, uptime_until - began) // 1_000_000,
    }
