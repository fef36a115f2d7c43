"""Migrations: `/os-migrations` has all moves there ever were, `/servers/{id}/migrations` live ones in flight, to be aborted
or forced. For admins. The records are the operations' own (`store/moves.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from instar.api.body import Uuid, convert
from instar.api.resource import ApiRoute, Compute, add_next, page_of, refuse_unknown, service_url, time_us
from instar.api.servers.actions import decode_action
from instar.api.servers.listing import visible_instance
from instar.clock import iso_us
from instar.errors import BadRequest, NotFound, OperationError, Unavailable
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.model.instance import Instance
from instar.model.move import Migration, MoveStatus, MoveType
from instar.store.contract import Value
from instar.store.instance_queries import SECOND_US
from instar.store.moves import migration_fetch, migrations_list, migrations_of_instance

TYPE_SINCE, FORCE_SINCE, SHOW_SINCE, ABORT_SINCE = 23, 22, 23, 24
PAGING_SINCE, ABORT_EARLY_SINCE, CHANGES_BEFORE_SINCE, OWNER_SINCE = 59, 65, 66, 80
RETRY_S = 5
# Statuses in which a live migration is shown below its server.
LIVE_IN_FLIGHT = frozenset({MoveStatus.QUEUED, MoveStatus.PREPARING, MoveStatus.RUNNING, MoveStatus.POST_MIGRATING})
NOT_BEGUN = frozenset({MoveStatus.QUEUED, MoveStatus.PREPARING})
# Parameter → column; `host` is either end of the move.
_EQUAL = {
    "instance_uuid": "instance_id", "status": "status", "source_compute": "source_host", "migration_type": "type",
    "user_id": "user_id", "project_id": "project_id",
}  # fmt: skip
_TEXT_MAX = 255


class InstanceId(msgspec.Struct, frozen=True):
    """The parameter `instance_uuid`, to be checked like a field of a body."""

    instance_uuid: Uuid


class Migrations:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        path, one, name = "/servers/{server_id}/migrations", "/{migration_id}", "os_compute_api:servers:migrations:"
        return [
            ApiRoute("GET", "/os-migrations", "os_compute_api:os-migrations:index", self.index),
            ApiRoute("GET", path, name + "index", self.of_server, since=SHOW_SINCE),
            ApiRoute("GET", path + one, name + "show", self.show, since=SHOW_SINCE),
            ApiRoute("POST", path + one + "/action", name + "force_complete", self.act, since=FORCE_SINCE),
            ApiRoute("DELETE", path + one, name + "delete", self.abort, since=ABORT_SINCE),
        ]

    # --- all there ever were ------------------------------------------------------------------------------------------

    async def index(self, request: Request) -> Answer:
        version: int = request.microversion
        where, params = _conditions(request)
        limit, marker = self._compute.settings.api.list_limit_max, None
        if version >= PAGING_SINCE:
            refuse_unknown(request, _known(version))
            limit, marker = page_of(request, self._compute)
        if marker is not None:
            last = await migration_fetch(self._compute.store, marker)
            if last is None:
                raise BadRequest(f"Marker {marker} could not be found.")
            where.append("(created_at < :last_at OR (created_at = :last_at AND id < :last_id))")
            params |= {"last_at": last.created_at, "last_id": last.id}
        found = await migrations_list(self._compute.store, where, params, limit=limit)
        views = [await self._view(one, request) for one in found]
        more = found[-1].uuid if version >= PAGING_SINCE and len(found) == limit else None
        return json_answer(add_next({"migrations": views}, "migrations", request, more))

    async def _ends(self, migration: Migration) -> dict[str, Any]:
        """Both ends of the move. What a host's address and hypervisor are called is as it is now."""
        hosts = await self._compute.hosts.seen()
        source = hosts.get(migration.source_host)
        dest = hosts.get(migration.dest_host) if migration.dest_host else None
        return {
            "source_compute": migration.source_host,
            "source_node": source.hypervisor_hostname if source else migration.source_host,
            "dest_compute": migration.dest_host,
            "dest_host": dest.inventory.host_ip if dest else None,
            "dest_node": dest.hypervisor_hostname if dest else migration.dest_host,
        }

    async def _view(self, migration: Migration, request: Request) -> dict[str, Any]:
        version: int = request.microversion
        view: dict[str, Any] = {
            "id": migration.id,
            "instance_uuid": migration.instance_id,
            "status": migration.status.value,
            "old_instance_type_id": _number_of_flavor(migration.old_flavor_id),
            "new_instance_type_id": _number_of_flavor(migration.new_flavor_id),
            "created_at": iso_us(migration.created_at),
            "updated_at": iso_us(migration.updated_at),
            **await self._ends(migration),
        }
        if version >= TYPE_SINCE:
            view["migration_type"] = migration.type.value
            if _is_in_flight(migration):
                below = f"/servers/{migration.instance_id}/migrations/{migration.id}"
                view["links"] = [
                    {"rel": "self", "href": service_url(request) + below},
                    {"rel": "bookmark", "href": request.base_url + below},
                ]
        return view | _since_later(migration, version)

    # --- live ones of a server, in flight -----------------------------------------------------------------------------

    async def of_server(self, request: Request) -> Answer:
        instance = await self._server(request)
        found = await migrations_of_instance(self._compute.store, instance.id)
        views = [await self._live_view(one, request.microversion) for one in found if _is_in_flight(one)]
        return json_answer({"migrations": views})

    async def show(self, request: Request) -> Answer:
        migration = await self._migration(request, await self._server(request))
        if not _is_in_flight(migration):
            raise NotFound(
                f"Migration {migration.id} of server {migration.instance_id} is not a live migration in progress."
            )
        return json_answer({"migration": await self._live_view(migration, request.microversion)})

    async def act(self, request: Request) -> Answer:
        """`{"force_complete": null}`, the one action there is."""
        body = decode_action(await request.body())
        if body != {"force_complete": None}:
            raise BadRequest("Invalid input: the only action of a migration is {'force_complete': null}.")
        instance = await self._server(request)
        migration = await self._migration(request, instance)
        if instance.task_state is not None and migration.status is not MoveStatus.RUNNING:
            raise BadRequest(_not_running(migration, "force_complete"))
        await self._tell(self._compute.lifecycle.guests.force_migration, instance)
        return empty_answer(202)

    async def abort(self, request: Request) -> Answer:
        instance = await self._server(request)
        migration = await self._migration(request, instance)
        early = migration.status in NOT_BEGUN and request.microversion >= ABORT_EARLY_SINCE
        if instance.task_state is not None and migration.status is not MoveStatus.RUNNING and not early:
            raise BadRequest(_not_running(migration, "abort"))
        abort = partial(self._compute.lifecycle.guests.abort_migration, early=migration.uuid if early else None)
        await self._tell(abort, instance)
        return empty_answer(202)

    async def _tell(self, call: Callable[[Instance], Awaitable[None]], instance: Instance) -> None:
        try:
            await call(instance)
        except OperationError as error:  # the host does not answer
            raise Unavailable(retry_after_s=RETRY_S) from error

    async def _server(self, request: Request) -> Instance:
        return await visible_instance(self._compute, request.context, request.params["server_id"])

    async def _migration(self, request: Request, instance: Instance) -> Migration:
        """By its number or its uuid. Raises NotFound."""
        wanted = request.params["migration_id"]
        for migration in await migrations_of_instance(self._compute.store, instance.id):
            if wanted in (str(migration.id), migration.uuid):
                return migration
        raise NotFound(f"Migration {wanted[:80]} could not be found for server {instance.id}.")

    async def _live_view(self, migration: Migration, version: int) -> dict[str, Any]:
        moved = migration.progress
        return {
            "id": migration.id,
            "server_uuid": migration.instance_id,
            "status": migration.status.value,
            "created_at": iso_us(migration.created_at),
            "updated_at": iso_us(migration.updated_at),
            "memory_total_bytes": moved.memory_total,
            "memory_processed_bytes": moved.memory_processed,
            "memory_remaining_bytes": moved.memory_remaining,
            "disk_total_bytes": moved.disk_total,
            "disk_processed_bytes": moved.disk_processed,
            "disk_remaining_bytes": moved.disk_remaining,
            **await self._ends(migration),
            **_since_later(migration, version),
        }


def _is_in_flight(migration: Migration) -> bool:
    return migration.type is MoveType.LIVE and migration.status in LIVE_IN_FLIGHT


def _not_running(migration: Migration, method: str) -> str:
    return (
        f"Migration {migration.id} state of instance {migration.instance_id} is {migration.status}. "
        f"Cannot {method} while the migration is in this state."
    )


def _since_later(migration: Migration, version: int) -> dict[str, Any]:
    view: dict[str, Any] = {}
    if version >= PAGING_SINCE:
        view["uuid"] = migration.uuid
    if version >= OWNER_SINCE:
        view |= {"user_id": migration.user_id, "project_id": migration.project_id}
    return view


def _known(version: int) -> frozenset[str]:
    known = {"host", "hidden", "limit", "marker", "changes-since", *_EQUAL} - {"user_id", "project_id"}
    if version >= CHANGES_BEFORE_SINCE:
        known.add("changes-before")
    if version >= OWNER_SINCE:
        known |= {"user_id", "project_id"}
    return frozenset(known)


def _conditions(request: Request) -> tuple[list[str], dict[str, Value]]:
    """What the query asks for, as conditions on columns and their values. Raises BadRequest."""
    version, where = request.microversion, []
    params: dict[str, Value] = {}
    known = _known(version)
    for name, column in _EQUAL.items():
        text = request.query_one(name)
        if text is not None and name in known:
            where.append(f"{column} = :{column}")
            params[column] = text[:_TEXT_MAX]
    if "instance_id" in params and version >= PAGING_SINCE:
        convert({"instance_uuid": params["instance_id"]}, InstanceId, version)
    host = request.query_one("host")
    if host is not None:
        where.append("(source_host = :host OR dest_host = :host)")
        params["host"] = host[:_TEXT_MAX]
    since = request.query_one("changes-since") if version >= PAGING_SINCE else None
    before = request.query_one("changes-before") if version >= CHANGES_BEFORE_SINCE else None
    if since is not None:
        where.append("updated_at >= :since")
        params["since"] = time_us("changes-since", since)
    if before is not None:
        where.append("updated_at < :before")  # the whole of the second that is named
        params["before"] = time_us("changes-before", before) + SECOND_US
    if since is not None and before is not None and params["since"] > params["before"] - SECOND_US:  # type: ignore[operator]
        raise BadRequest("The value of changes-since must be less than or equal to changes-before.")
    return where, params


def _number_of_flavor(flavor_id: str) -> int:
    """The API shows a number here that no client can look up: the id where it is one, else one made of it."""
    if flavor_id.isascii() and flavor_id.isdecimal() and len(flavor_id) < 10:
        return int(flavor_id)
    return zlib.crc32(flavor_id.encode()) & 0x7FFFFFFF
