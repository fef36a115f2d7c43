"""Whose record it is: what every handler of the Network API asks before it does anything."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from instar.errors import BadRequest, Forbidden, NotFound
from instar.http.context import RequestContext
from instar.networks.failures import ChangedMeanwhile, OverQuota, RevisionConflict
from instar.store.contract import Store, WriteConflict
from instar.store.network_records import Table, record_fetch
from instar.store.networks import network_quota

R = TypeVar("R", bound=msgspec.Struct)
T = TypeVar("T")

ATTEMPTS_MAX = 100  # each one that fails means that somebody else got on


async def visible(store: Store, table: Table[R], record_id: str, context: RequestContext, error: type[NotFound]) -> R:
    """The record, where the caller may see it; else `error`, which does not tell whether it is there."""
    record = await record_fetch(store, table, record_id, viewer=None if context.is_admin else context.project_id)
    if record is None:
        raise error(id=record_id)
    return record


def require_owner(context: RequestContext, action: str, *project_ids: str) -> None:
    """Raises Forbidden unless the caller is an admin or in one of these projects."""
    if not context.is_admin and context.project_id not in project_ids:
        raise Forbidden(action=action)


def project_of(context: RequestContext, project_id: str | None, tenant_id: str | None, action: str) -> str:
    """The project that gets a new record. Raises Forbidden where that is another one, and the caller no admin."""
    if project_id and tenant_id and project_id != tenant_id:
        raise BadRequest("'project_id' and 'tenant_id' do not match")
    chosen = project_id or tenant_id or context.project_id
    require_owner(context, f"{action}:project_id", chosen)
    return chosen


def one_or_many(one: T | UnsetType, many: Sequence[T] | UnsetType, name: str) -> tuple[Sequence[T], bool]:
    """What a body asks to make, and whether it was sent as a list. Raises BadRequest unless it has exactly one form."""
    if one is not UNSET and many is UNSET:
        return [one], False
    if many is not UNSET and one is UNSET:
        return many, True
    raise BadRequest(f"Invalid input: the body must have either `{name}` or `{name}s`.")


async def room_for(store: Store, resource: str, default: int, wanted: dict[str, int]) -> dict[str, int]:
    """The limit of each project (-1: none) that wants so many more of a resource. Raises OverQuota.

    What is asked here may change until the insert: that has the limit in its condition."""
    limits = {}
    for project_id, count in wanted.items():
        own, used = await network_quota(store, project_id)
        limits[project_id] = limit = own.get(resource, default)
        if 0 <= limit < used[resource] + count:
            raise OverQuota(resource=resource, requested=count, used=used[resource], limit=limit)
    return limits


async def decided_again(attempt: Callable[[], Awaitable[T]], kind: str, record_id: str) -> T:
    """The attempt, once more whenever somebody else was faster. Raises RevisionConflict when that never ends."""
    for _ in range(ATTEMPTS_MAX):
        try:
            return await attempt()
        except (WriteConflict, ChangedMeanwhile):
            continue
    raise RevisionConflict(kind=kind, id=record_id)


def given(**fields: object) -> dict[str, object]:
    """The fields that a change has."""
    return {name: value for name, value in fields.items() if value is not UNSET}
