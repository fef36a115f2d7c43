"""The list of images as one SELECT: who sees what, filters, sorting, paging by marker. Called by instar.images.

SQL is put together from parts that stand here; every value is a parameter (hence the silenced S608).
"""

from __future__ import annotations

import msgspec

from instar.store.conditions import Conditions
from instar.store.contract import Store, Value
from instar.store.images import COLUMNS, ImageRecord, image_from_row

# API name → (expression to sort and page by, attribute of ImageRecord, what stands for NULL).
SORT_KEYS: dict[str, tuple[str, str, Value]] = {
    "id": ("i.id", "id", None),
    "name": ("COALESCE(i.name, '')", "name", ""),
    "status": ("i.status", "status", None),
    "owner": ("COALESCE(i.owner, '')", "owner", ""),
    "visibility": ("i.visibility", "visibility", None),
    "container_format": ("COALESCE(i.container_format, '')", "container_format", ""),
    "disk_format": ("COALESCE(i.disk_format, '')", "disk_format", ""),
    "size": ("COALESCE(i.size_bytes, -1)", "size_bytes", -1),
    "virtual_size": ("COALESCE(i.virtual_size_bytes, -1)", "virtual_size_bytes", -1),
    "min_disk": ("i.min_disk_gib", "min_disk_gib", None),
    "min_ram": ("i.min_ram_mib", "min_ram_mib", None),
    "created_at": ("i.created_at", "created_at", None),
    "updated_at": ("i.updated_at", "updated_at", None),
}

# API name → column, for filters on equality (or on one of several values).
EQUALS: dict[str, str] = {
    "id": "i.id",
    "name": "i.name",
    "status": "i.status",
    "owner": "i.owner",
    "container_format": "i.container_format",
    "disk_format": "i.disk_format",
    "min_disk": "i.min_disk_gib",
    "min_ram": "i.min_ram_mib",
    "protected": "i.protected",
    "checksum": "i.md5",
    "os_hash_value": "i.sha512",
}

# API name of a range → what is compared. Times are compared as they are shown: in whole seconds.
RANGES: dict[str, str] = {
    "size": "i.size_bytes",
    "created_at": "(i.created_at / 1000000)",
    "updated_at": "(i.updated_at / 1000000)",
}

_OPERATORS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "eq": "=", "neq": "<>"}


class ImageQuery(msgspec.Struct, frozen=True):
    """What to list. `equals` has a filter's alternatives; `ranges` are (name, operator, value): gt gte lt lte eq neq.

    `visibility` None is what a project uses by itself: its own, public ones, and shared ones with `member_status`.
    `sort` are (key of SORT_KEYS, ascending); it must end with a unique key. `marker`: the page before ended there.
    """

    project_id: str
    is_admin: bool
    sort: tuple[tuple[str, bool], ...]
    limit: int
    visibility: str | None = None
    member_status: str = "accepted"
    hidden: bool = False
    equals: dict[str, tuple[Value, ...]] = {}
    ranges: tuple[tuple[str, str, int], ...] = ()
    tags: tuple[str, ...] = ()
    properties: dict[str, str] = {}
    marker: ImageRecord | None = None


async def image_list(store: Store, query: ImageQuery) -> list[ImageRecord]:
    """One page of images, in the order asked."""
    where = Conditions()
    where.add("i.deleted_at IS NULL")
    where.add(f"i.hidden = {where.value(int(query.hidden))}")
    _add_visibility(where, query)
    _add_filters(where, query)
    if query.marker is not None:
        _add_after(where, query.sort, query.marker)
    order = ", ".join(f"{SORT_KEYS[key][0]} {'ASC' if ascending else 'DESC'}" for key, ascending in query.sort)
    columns = ", ".join(f"i.{column}" for column in COLUMNS.split(", "))
    sql = (
        f"SELECT {columns} FROM images i WHERE {' AND '.join(where.conditions)} "  # noqa: S608
        f"ORDER BY {order} LIMIT {where.value(query.limit)}"
    )
    return [image_from_row(row) for row in await store.read(sql, where.params)]


def _add_visibility(where: Conditions, query: ImageQuery) -> None:
    project = where.value(query.project_id)
    member = f"SELECT 1 FROM image_members m WHERE m.image_id = i.id AND m.project_id = {project}"  # noqa: S608
    if query.member_status != "all":
        member += f" AND m.status = {where.value(query.member_status)}"
    own = f"i.owner = {project}"
    shared = f"(i.visibility = 'shared' AND EXISTS ({member}))"
    asked = query.visibility
    if asked in ("public", "community"):
        where.add(f"i.visibility = {where.value(asked)}")
    elif asked == "private":
        where.add("i.visibility = 'private'" if query.is_admin else f"i.visibility = 'private' AND {own}")
    elif asked == "shared":
        where.add("i.visibility = 'shared'" if query.is_admin else f"i.visibility = 'shared' AND ({own} OR {shared})")
    elif not query.is_admin:
        common = "i.visibility IN ('public', 'community')" if asked == "all" else "i.visibility = 'public'"
        where.add(f"({common} OR {own} OR {shared})")


def _add_filters(where: Conditions, query: ImageQuery) -> None:
    for name, values in query.equals.items():
        where.add(f"{EQUALS[name]} IN ({where.values(values)})")
    for name, operator, number in query.ranges:
        where.add(f"{RANGES[name]} {_OPERATORS[operator]} {where.value(number)}")
    for tag in query.tags:
        where.add(f"i.id IN (SELECT t.image_id FROM image_tags t WHERE t.tag = {where.value(tag)})")  # noqa: S608
    for name, text in query.properties.items():
        having = f"p.name = {where.value(name)} AND p.value = {where.value(text)}"
        where.add(f"i.id IN (SELECT p.image_id FROM image_properties p WHERE {having})")  # noqa: S608


def _add_after(where: Conditions, sort: tuple[tuple[str, bool], ...], marker: ImageRecord) -> None:
    order: list[tuple[str, bool, Value]] = []
    for key, ascending in sort:
        expression, attribute, null = SORT_KEYS[key]
        found = getattr(marker, attribute)
        order.append((expression, ascending, null if found is None else found))
    where.add_after(order)
