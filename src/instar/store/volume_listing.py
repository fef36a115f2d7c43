"""Lists of volumes, snapshots and attachments as one SELECT each: filters on equality, sorting, pages. For the API.

SQL is put together from names that stand here; every value is a parameter (hence the silenced S608).
"""

from __future__ import annotations

from typing import NamedTuple

from instar.store.contract import Row, Store, Value

# API name → expression.
VOLUME_KEYS = {
    "id": "t.id", "status": "t.status", "size": "t.size_gib", "availability_zone": "t.availability_zone",
    "created_at": "t.created_at", "name": "COALESCE(t.name, '')", "bootable": "t.bootable",
    "multiattach": "t.multiattach", "volume_type_id": "t.type_id", "user_id": "t.user_id", "project_id": "t.project_id",
    "updated_at": "COALESCE(t.updated_at, 0)", "snapshot_id": "COALESCE(t.snapshot_id, '')",
    "source_volid": "COALESCE(t.source_volume_id, '')",
}  # fmt: skip
SNAPSHOT_KEYS = {
    "id": "t.id", "status": "t.status", "size": "t.size_gib", "volume_id": "t.volume_id", "created_at": "t.created_at",
    "name": "COALESCE(t.name, '')", "user_id": "t.user_id", "project_id": "t.project_id",
}  # fmt: skip
ATTACHMENT_KEYS = {
    "id": "t.id", "volume_id": "t.volume_id", "instance_id": "t.instance_id", "attach_status": "t.status",
    "status": "t.status", "created_at": "t.created_at",
}  # fmt: skip


class ListQuery(NamedTuple):
    """`project_id` None: of all projects. `equals`: (API name, value); the special name `metadata` takes none.

    `sort`: (API name, ascending). `marker`: the id of the record that the page before ended with."""

    project_id: str | None
    limit: int
    offset: int = 0
    equals: tuple[tuple[str, Value], ...] = ()
    like: tuple[tuple[str, str], ...] = ()
    sort: tuple[tuple[str, bool], ...] = (("created_at", False), ("id", False))
    marker: str | None = None


def _select(table: str, keys: dict[str, str], query: ListQuery, *, owner: str) -> tuple[str, dict[str, Value]]:
    conditions, params = ["1 = 1"], {"limit": query.limit, "offset": query.offset}
    bound: dict[str, Value] = dict(params)
    if query.project_id is not None:
        conditions.append(f"{owner} = :project_id")
        bound["project_id"] = query.project_id
    for number, (name, value) in enumerate(query.equals):
        conditions.append(f"{keys[name]} = :e{number}")
        bound[f"e{number}"] = value
    for number, (name, text) in enumerate(query.like):
        conditions.append(f"lower({keys[name]}) LIKE lower(:l{number}) ESCAPE '!'")
        bound[f"l{number}"] = "%" + text.replace("!", "!!").replace("%", "!%").replace("_", "!_") + "%"
    sort = query.sort if any(name == "id" for name, _ in query.sort) else (*query.sort, ("id", query.sort[-1][1]))
    if query.marker is not None:
        conditions.append(_after(table, keys, sort))
        bound["marker"] = query.marker
    order = ", ".join(f"{keys[name]} {'ASC' if up else 'DESC'}" for name, up in sort)
    sql = (
        f"SELECT t.*, v.project_id AS project_id FROM {table} t JOIN volumes v ON v.id = t.volume_id"  # noqa: S608
        if table == "volume_attachments"
        else f"SELECT t.* FROM {table} t"  # noqa: S608
    )
    return f"{sql} WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT :limit OFFSET :offset", bound


def _after(table: str, keys: dict[str, str], sort: tuple[tuple[str, bool], ...]) -> str:
    """Behind the marker in the order of `sort`."""

    def of_marker(name: str) -> str:
        return f"(SELECT {keys[name].replace('t.', 'm.')} FROM {table} m WHERE m.id = :marker)"  # noqa: S608

    alternatives = []
    for number, (name, up) in enumerate(sort):
        equal = [f"{keys[other]} = {of_marker(other)}" for other, _ in sort[:number]]
        alternatives.append("(" + " AND ".join([*equal, f"{keys[name]} {'>' if up else '<'} {of_marker(name)}"]) + ")")
    return "(" + " OR ".join(alternatives) + ")"


async def volume_rows(store: Store, query: ListQuery) -> list[Row]:
    return list(await store.read(*_select("volumes", VOLUME_KEYS, query, owner="t.project_id")))


async def snapshot_rows(store: Store, query: ListQuery) -> list[Row]:
    return list(await store.read(*_select("volume_snapshots", SNAPSHOT_KEYS, query, owner="t.project_id")))


async def attachment_rows(store: Store, query: ListQuery) -> list[Row]:
    return list(await store.read(*_select("volume_attachments", ATTACHMENT_KEYS, query, owner="v.project_id")))


async def attachments_of_project(store: Store, project_id: str | None) -> dict[str, list[Row]]:
    """Attachments of all volumes of a project (None: of all), by volume: a list of volumes shows them."""
    rows = await store.read(
        "SELECT a.*, v.project_id FROM volume_attachments a JOIN volumes v ON v.id = a.volume_id "
        "WHERE :project_id = '' OR v.project_id = :project_id ORDER BY a.created_at, a.id",
        {"project_id": project_id or ""},
    )
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["volume_id"], []).append(row)
    return found


async def volume_summary(store: Store, project_id: str | None) -> tuple[int, int]:
    """How many volumes, and their GiB."""
    rows = await store.read(
        "SELECT COUNT(*) AS n, COALESCE(SUM(size_gib), 0) AS gib FROM volumes "
        "WHERE :project_id = '' OR project_id = :project_id",
        {"project_id": project_id or ""},
    )
    return rows[0]["n"], rows[0]["gib"]
