"""SQL of the volume service's quotas and volume types. Called by instar.volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from instar.clock import now_us
from instar.errors import Conflict, NotFound, QuotaExceeded
from instar.store.contract import Row, Statement, Store
from instar.store.quotas import counting_lock

DEFAULT_PROJECT = "default"  # the row owner of the limits that hold for every project without its own
_USED = {
    "volumes": "(SELECT COUNT(*) FROM volumes WHERE project_id = :project_id)",
    "snapshots": "(SELECT COUNT(*) FROM volume_snapshots WHERE project_id = :project_id)",
    "gigabytes": "((SELECT COALESCE(SUM(size_gib), 0) FROM volumes WHERE project_id = :project_id) + "
    "(SELECT COALESCE(SUM(size_gib), 0) FROM volume_snapshots WHERE project_id = :project_id))",
}


async def volume_limits(store: Store, defaults: Mapping[str, int], project_id: str) -> dict[str, int]:
    """Every limit of a project: its own, over those of all, over the settings."""
    rows = await store.read(
        "SELECT project_id, resource, hard_limit FROM volume_quotas WHERE project_id IN (:id, :all)",
        {"id": project_id, "all": DEFAULT_PROJECT},
    )
    found: dict[str, dict[str, int]] = {"all": {}, "own": {}}
    for row in rows:
        found["all" if row["project_id"] == DEFAULT_PROJECT else "own"][row["resource"]] = row["hard_limit"]
    return {**defaults, **found["all"], **found["own"]}


async def volume_usage(store: Store, project_id: str) -> dict[str, int]:
    """How much of each resource a project has."""
    columns = ", ".join(f"{sql} AS {name}" for name, sql in _USED.items())
    rows = await store.read(f"SELECT {columns}", {"project_id": project_id})
    return {name: rows[0][name] for name in _USED}


def quota_take(
    project_id: str, wanted: Mapping[str, int], limits: Mapping[str, int], used: Mapping[str, int]
) -> tuple[Statement, ...]:
    """There is room for so much more of each resource (limit -1: always). Stands before the INSERT or UPDATE.

    The first statement holds a row until the commit, so that no two requests both see the last place. `used` is what
    was read a moment before, for the words of QuotaExceeded."""
    lock = f"volumes:{project_id}"
    statements = [counting_lock(lock)]
    for resource, amount in wanted.items():
        limit = limits[resource]
        if limit < 0 or amount <= 0:
            continue
        statements.append(
            Statement(
                "UPDATE counting_locks SET taken_at = taken_at "  # noqa: S608 - one of three constants
                f"WHERE owner = :lock AND {_USED[resource]} + :amount <= :limit",
                {"lock": lock, "project_id": project_id, "amount": amount, "limit": limit},
                rows=1,
                error=QuotaExceeded(resource=resource, requested=amount, used=used[resource], limit=limit),
            )
        )
    return tuple(statements)


async def volume_limits_set(store: Store, project_id: str, limits: Mapping[str, int]) -> None:
    statements = [
        Statement(
            """INSERT INTO volume_quotas VALUES (:project_id, :resource, :limit)
               ON CONFLICT (project_id, resource) DO UPDATE SET hard_limit = :limit""",
            {"project_id": project_id, "resource": resource, "limit": limit},
        )
        for resource, limit in sorted(limits.items())
    ]
    if statements:
        await store.write(*statements)


async def volume_limits_reset(store: Store, project_id: str) -> None:
    await store.write(Statement("DELETE FROM volume_quotas WHERE project_id = :id", {"id": project_id}))


# --- types ----------------------------------------------------------------------------------------------------------


class TypeRecord(msgspec.Struct, frozen=True):
    """A volume type. Times are microseconds since the epoch."""

    id: str
    name: str
    description: str | None
    public: bool
    extra_specs: dict[str, str]
    created_at: int
    updated_at: int | None = None

    @property
    def multiattach(self) -> bool:
        return self.extra_specs.get("multiattach", "").replace(" ", "").lower() == "<is>true"


_SPECS = msgspec.json.Decoder(dict[str, str])


def _type(row: Row) -> TypeRecord:
    return TypeRecord(
        row["id"], row["name"], row["description"], bool(row["public"]), _SPECS.decode(row["extra_specs"]),
        row["created_at"], row["updated_at"],
    )  # fmt: skip


async def type_list(store: Store) -> list[TypeRecord]:
    """All types, the newest first: there are few."""
    return [_type(row) for row in await store.read("SELECT * FROM volume_types ORDER BY created_at DESC, id")]


async def type_access(store: Store) -> set[tuple[str, str]]:
    """(type id, project id): who was given access to a type that is not public."""
    return {(row["type_id"], row["project_id"]) for row in await store.read("SELECT * FROM volume_type_access")}


async def type_insert(store: Store, record: TypeRecord, *, once: bool = False) -> None:
    """Raises Conflict where the name is taken; `once`: then nothing happens."""
    await store.write(
        Statement(
            "INSERT INTO volume_types VALUES (:id, :name, :description, :public, :specs, :created_at, NULL)"  # noqa: S608
            + (" ON CONFLICT DO NOTHING" if once else ""),
            {
                "id": record.id, "name": record.name, "description": record.description, "public": int(record.public),
                "specs": msgspec.json.encode(record.extra_specs), "created_at": record.created_at,
            },
            duplicate=Conflict(f"Volume Type {record.name} already exists."),
        )
    )  # fmt: skip


async def type_update(store: Store, record: TypeRecord) -> None:
    await store.write(
        Statement(
            """UPDATE volume_types SET name = :name, description = :description, public = :public, extra_specs = :specs,
                 updated_at = :now WHERE id = :id""",
            {
                "id": record.id, "name": record.name, "description": record.description, "public": int(record.public),
                "specs": msgspec.json.encode(record.extra_specs), "now": now_us(),
            },
            rows=1,
            error=NotFound(kind="Volume type", id=record.id),
            duplicate=Conflict(f"Volume Type {record.name} already exists."),
        )
    )  # fmt: skip


async def type_delete(store: Store, type_id: str, in_use: Conflict) -> None:
    """Raises NotFound, or `in_use` while volumes have the type."""
    await store.write(
        Statement(
            "UPDATE volume_types SET name = name WHERE id = :id", {"id": type_id},
            rows=1, error=NotFound(kind="Volume type", id=type_id),
        ),
        Statement(
            "DELETE FROM volume_types WHERE id = :id AND NOT EXISTS (SELECT 1 FROM volumes WHERE type_id = :id)",
            {"id": type_id},
            rows=1,
            error=in_use,
        ),
    )  # fmt: skip


async def type_access_change(store: Store, type_id: str, project_id: str, *, add: bool) -> None:
    """Raises Conflict where access was given already, NotFound where there is none to take."""
    params = {"type_id": type_id, "project_id": project_id}
    if add:
        already = Conflict(f"Volume type access for {type_id} / {project_id} combination already exists.")
        sql = "INSERT INTO volume_type_access VALUES (:type_id, :project_id)"
        await store.write(Statement(sql, params, duplicate=already))
    else:
        await store.write(
            Statement(
                "DELETE FROM volume_type_access WHERE type_id = :type_id AND project_id = :project_id", params,
                rows=1, error=NotFound(kind="Volume type access", id=project_id),
            )
        )  # fmt: skip


async def type_access_list(store: Store, type_id: str) -> Sequence[str]:
    rows = await store.read("SELECT project_id FROM volume_type_access WHERE type_id = :id ORDER BY 1", {"id": type_id})
    return [row["project_id"] for row in rows]
