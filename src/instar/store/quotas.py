"""SQL of quota limits: a project's own, over the class default, over the settings. Called by the API and by `create`."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from instar.clock import now_us
from instar.config import QuotaSettings
from instar.errors import QuotaExceeded
from instar.store.contract import Statement, Store

CLASS_PROJECT = "default"  # the row owner of the limits that hold for every project without its own


async def quota_limits(store: Store, defaults: QuotaSettings, project_id: str) -> dict[str, int]:
    """Every limit of a project by the names of QuotaSettings (`ram` in MiB, -1: no limit)."""
    limits: dict[str, int] = msgspec.structs.asdict(defaults)
    own: dict[str, int] = {}
    rows = await store.read(
        "SELECT project_id, resource, hard_limit FROM quota_limits "
        "WHERE project_id IN (:project_id, :class_project) AND user_id = ''",
        {"project_id": project_id, "class_project": CLASS_PROJECT},
    )
    for row in rows:
        (limits if row["project_id"] == CLASS_PROJECT else own)[row["resource"]] = row["hard_limit"]
    return limits | own


async def quota_limits_default(store: Store, defaults: QuotaSettings) -> dict[str, int]:
    """The limits of a project that has none of its own."""
    return await quota_limits(store, defaults, CLASS_PROJECT)


async def quota_set(store: Store, project_id: str, limits: Mapping[str, int]) -> None:
    """Sets limits of a project (or of CLASS_PROJECT: the class default). What is used already does not matter."""
    statements = [
        Statement(
            """INSERT INTO quota_limits (project_id, user_id, resource, hard_limit)
               VALUES (:project_id, '', :resource, :limit)
               ON CONFLICT (project_id, user_id, resource) DO UPDATE SET hard_limit = :limit""",
            {"project_id": project_id, "resource": resource, "limit": limit},
        )
        for resource, limit in sorted(limits.items())
    ]
    if statements:
        await store.write(*statements)


async def quota_reset(store: Store, project_id: str) -> None:
    """The project has no limits of its own any more."""
    await store.write(Statement("DELETE FROM quota_limits WHERE project_id = :id", {"id": project_id}))


# What is counted in its own table: resource → how many there are of one owner.
_COUNTS: Mapping[str, str] = {
    "key_pairs": "SELECT count(*) FROM key_pairs WHERE user_id = :owner",
    "server_groups": "SELECT count(*) FROM server_groups WHERE project_id = :owner",
}


def counting_lock(owner: str) -> Statement:
    """Holds a row of that name until the commit. Stands before whatever counts what others add at the same moment: without
    it, two transactions of PostgreSQL both see the last place. `owner` names what is counted and whose it is."""
    return Statement(
        "INSERT INTO counting_locks VALUES (:lock, :now) ON CONFLICT (owner) DO UPDATE SET taken_at = :now",
        {"lock": owner, "now": now_us()},
    )


def quota_take_one(resource: str, owner: str, limit: int) -> tuple[Statement, ...]:
    """There is room for one more of `owner`'s key_pairs or server_groups (limit -1: always). Stands before the INSERT.

    The first statement holds a row until the commit, so that no two requests both see the last place.
    Raises QuotaExceeded."""
    lock = f"{resource}:{owner}"
    return (
        counting_lock(lock),
        Statement(
            "UPDATE counting_locks SET taken_at = taken_at "  # noqa: S608 - one of two constants
            f"WHERE owner = :lock AND (:limit < 0 OR ({_COUNTS[resource]}) < :limit)",
            {"lock": lock, "owner": owner, "limit": limit},
            rows=1,
            error=QuotaExceeded(resource=resource, requested=1, used=limit, limit=limit),
        ),
    )


async def quota_count(store: Store, resource: str, owner: str) -> int:
    """How many key_pairs a user or server_groups a project has."""
    return int((await store.read(f"SELECT ({_COUNTS[resource]}) AS n", {"owner": owner}))[0]["n"])
