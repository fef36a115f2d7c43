"""What all routes of the Block Storage API share: their paths, whose a record is, metadata that is edited by many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from instar.errors import BadRequest, Conflict, NotFound
from instar.http.answer import Answer
from instar.http.request import Request
from instar.http.routing import Handler, Route
from instar.store.contract import WriteConflict
from instar.store.volume_records import SnapshotRecord, VolumeRecord
from instar.volumes.schemas import METADATA_MAX
from instar.volumes.service import Volumes

_R = TypeVar("_R", VolumeRecord, SnapshotRecord)
EDIT_ATTEMPTS_MAX = 10


def both_paths(routes: Iterable[Route]) -> list[Route]:
    """Each route below /v3 as it is, and below /v3/{project_id}: clients know both."""
    found = []
    for route in routes:
        found.append(route._replace(path=f"/v3{route.path}"))
        found.append(route._replace(path=f"/v3/{{url_project_id}}{route.path}", handler=_of_own_project(route)))
    return found


def _of_own_project(route: Route) -> Handler:
    async def handler(request: Request) -> Answer:
        if request.params["url_project_id"] != request.context.project_id:
            raise BadRequest("Malformed request url: its project is not that of the token.")
        return await route.handler(request)

    return handler


def asked_since(request: Request, version: int) -> None:
    """Raises NotFound where the microversion asked for has no such resource."""
    if request.microversion < version:
        raise NotFound("The resource could not be found.")


async def own_volume(volumes: Volumes, request: Request, volume_id: str | None = None) -> VolumeRecord:
    """The volume that the path (or the body) names. Raises NotFound, also for another project's."""
    context = request.context
    return await volumes.fetch(
        volume_id or request.params["volume_id"], project_id=context.project_id, is_admin=context.is_admin
    )


async def own_snapshot(volumes: Volumes, request: Request) -> SnapshotRecord:
    context = request.context
    return await volumes.fetch_snapshot(
        request.params["snapshot_id"], project_id=context.project_id, is_admin=context.is_admin
    )


async def edit(fetch: Callable[[], Awaitable[_R]], change: Callable[[_R], Awaitable[None]]) -> _R:
    """Read, change, compare and swap; once more when somebody else was faster. `change` raises WriteConflict then."""
    for _ in range(EDIT_ATTEMPTS_MAX):
        record = await fetch()
        try:
            await change(record)
        except WriteConflict:
            continue
        return await fetch()
    raise Conflict("The record is being changed by others again and again: try once more.")


def merged(before: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """Raises BadRequest for more items than a record may have."""
    after = {**before, **new}
    if len(after) > METADATA_MAX:
        raise BadRequest(f"Maximum number of metadata items exceeds {METADATA_MAX}.")
    return after
