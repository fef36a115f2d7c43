"""SQL of what the Compute API reads and changes of instances: lists, one for show, tags and names, usage over time.

A list is one SELECT; what cannot be asked in SQL (tags, patterns) is left to the caller's residual filter, which asks for
the next part when a page is not full yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec

from instar.clock import now_us
from instar.model.instance import Instance, InstanceSpec
from instar.model.states import TaskState, VmState
from instar.store.conditions import Conditions
from instar.store.contract import Row, Statement, Store, Value

# What may be compared for equality, and sorted by: name in the API → column. Each takes the values' SQL type.
COLUMNS: Mapping[str, str] = {
    "availability_zone": "availability_zone", "host": "host", "image": "image_id", "flavor": "flavor_id",
    "key_name": "key_name", "power_state": "power_state", "project_id": "project_id",
    "reservation_id": "reservation_id", "user_id": "user_id", "uuid": "id", "vm_state": "vm_state",
    "task_state": "task_state", "locked_by": "locked_by",
}  # fmt: skip
SORTS: Mapping[str, str] = {
    "availability_zone": "COALESCE(availability_zone, '')", "created_at": "created_at", "display_name": "name",
    "host": "COALESCE(host, '')", "hostname": "hostname", "image_ref": "COALESCE(image_id, '')",
    "instance_type_id": "flavor_id", "key_name": "COALESCE(key_name, '')",
    "launched_at": "COALESCE(launched_at, 0)", "locked": "COALESCE(locked_by, '')",
    "locked_by": "COALESCE(locked_by, '')", "node": "COALESCE(host, '')", "power_state": "power_state",
    "project_id": "project_id", "task_state": "COALESCE(task_state, '')",
    "terminated_at": "COALESCE(terminated_at, 0)", "updated_at": "updated_at", "user_id": "user_id", "uuid": "id",
    "vm_state": "vm_state",
}  # fmt: skip
SECOND_US = 1_000_000


class Substring(msgspec.Struct, frozen=True):
    """`text` is in the column (case matters); at its start or end where anchored there."""

    column: str  # name | hostname | addresses
    text: str
    at_start: bool = False
    at_end: bool = False


class SoftDeleted(Enum):
    """What a list does with instances that wait to be restored or deleted: they are in it as all others, not, or together
    with the deleted ones."""

    AS_ALL = 1
    HIDDEN = 2
    WITH_DELETED = 3


class InstanceQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which instances, in which order. Empty tuples and None do not restrict; times are microseconds.

    `equal`: (column, allowed values), None among them for NULL. `states`: (vm_state, task_states that show so, task_states
    that show otherwise). `seconds`: (column of a time, second). `after` are the sort values of the row before the first."""

    project_id: str | None = None
    deleted: bool | None = False
    soft_deleted: SoftDeleted = SoftDeleted.AS_ALL
    equal: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    states: tuple[tuple[VmState, tuple[TaskState, ...], tuple[TaskState, ...]], ...] | None = None
    substrings: tuple[Substring, ...] = ()
    seconds: tuple[tuple[str, int], ...] = ()
    changed_since_us: int | None = None
    changed_before_us: int | None = None
    order: tuple[tuple[str, bool], ...] = (("created_at", True), ("uuid", True))  # (key of SORTS, descending)
    after: tuple[Value, ...] | None = None
    limit: int = 1000


def instance_select(query: InstanceQuery) -> tuple[str, dict[str, Value]]:
    """The SELECT of a list. All names come from the tables above, all values are parameters."""
    sql = Conditions()
    if query.project_id is not None:
        sql.add(f"project_id = {sql.value(query.project_id)}")
    _add_deleted(sql, query.deleted, query.soft_deleted)
    for column, values in query.equal:
        _add_equal(sql, column, values)
    if query.states is not None:
        _add_states(sql, query.states)
    for substring in query.substrings:
        _add_substring(sql, substring)
    for column, second in query.seconds:
        start = sql.value(second)
        sql.add(f"{column} >= {start} AND {column} < {start} + {SECOND_US}")
    if query.changed_since_us is not None:
        sql.add(f"updated_at >= {sql.value(query.changed_since_us)}")
    if query.changed_before_us is not None:
        # "before" includes the whole of the second that is named.
        sql.add(f"updated_at < {sql.value(query.changed_before_us + SECOND_US)}")
    if query.after is not None:
        order_and_marker = zip(query.order, query.after, strict=True)
        sql.add_after((SORTS[key], not down, value) for (key, down), value in order_and_marker)
    order = ", ".join(f"{SORTS[key]} {'DESC' if down else 'ASC'}" for key, down in query.order)
    where = " AND ".join(f"({one})" for one in sql.conditions) or "1 = 1"
    limit = sql.value(query.limit)
    return f"SELECT * FROM instances WHERE {where} ORDER BY {order} LIMIT {limit}", sql.params  # noqa: S608 - see above


def _add_deleted(sql: Conditions, deleted: bool | None, soft: SoftDeleted) -> None:
    waiting = sql.value(VmState.SOFT_DELETED.value)
    if soft is SoftDeleted.WITH_DELETED:
        sql.add(f"deleted = 1 OR vm_state = {waiting}")
    elif deleted is not None:
        sql.add(f"deleted = {sql.value(int(deleted))}")
    if soft is SoftDeleted.HIDDEN:
        sql.add(f"vm_state <> {waiting}")


def _add_equal(sql: Conditions, column: str, values: tuple[Value, ...]) -> None:
    parts = []
    given = [value for value in values if value is not None]
    if given:
        parts.append(f"{column} IN ({sql.values(given)})")
    if len(given) < len(values):
        parts.append(f"{column} IS NULL")
    sql.add(" OR ".join(parts) or "1 = 0")


def _add_states(sql: Conditions, states: tuple[tuple[VmState, tuple[TaskState, ...], tuple[TaskState, ...]], ...]) -> None:
    parts = []
    for vm_state, tasks, other_tasks in states:
        part = f"vm_state = {sql.value(vm_state.value)}"
        if tasks:
            part += f" AND task_state IN ({sql.values(task.value for task in tasks)})"
        elif other_tasks:
            others = ", ".join(sql.value(task.value) for task in other_tasks)
            part += f" AND (task_state IS NULL OR task_state NOT IN ({others}))"
        parts.append(f"({part})")
    sql.add(" OR ".join(parts) or "1 = 0")


def _add_substring(sql: Conditions, one: Substring) -> None:
    text = sql.value(one.text)
    length = len(one.text)
    if one.at_start and one.at_end:
        sql.add(f"{one.column} = {text}")
    elif one.at_start:
        sql.add(f"substr({one.column}, 1, {length}) = {text}")
    elif one.at_end:
        sql.add(f"length({one.column}) >= {length} AND substr({one.column}, length({one.column}) - {length - 1}) = {text}")
    elif one.text:
        # replace() is the one function for this that both databases have and that knows no wildcards.
        sql.add(f"replace({one.column}, {text}, '') <> {one.column}")


async def instance_list(store: Store, query: InstanceQuery) -> Sequence[Row]:
    """Rows of `instances`, whole."""
    return await store.read(*instance_select(query))


async def instance_sort_values(
    store: Store, instance_id: str, order: tuple[tuple[str, bool], ...], project_id: str | None
) -> tuple[Value, ...] | None:
    """Where a marker stands in an order; None when there is no such instance (in the project, where one is given)."""
    keys = ", ".join(f"{SORTS[key]} AS s{index}" for index, (key, _) in enumerate(order))
    rows = await store.read(
        f"SELECT {keys} FROM instances WHERE id = :id"  # noqa: S608 - expressions of SORTS
        " AND (CAST(:project_id AS TEXT) IS NULL OR project_id = :project_id)",
        {"id": instance_id, "project_id": project_id},
    )
    return tuple(rows[0][f"s{index}"] for index in range(len(order))) if rows else None


async def instance_row(store: Store, instance_id: str) -> Row | None:
    """One row, deleted or not."""
    rows = await store.read("SELECT * FROM instances WHERE id = :id", {"id": instance_id})
    return rows[0] if rows else None


def instance_update_spec(
    instance: Instance, spec: InstanceSpec, *, name: str | None = None, hostname: str | None = None
) -> Statement:
    """What the user may change at any time, if nobody changed it since `instance` was read (WriteConflict else)."""
    return Statement(
        "UPDATE instances SET spec = :spec, name = :name, hostname = :hostname, revision = revision + 1, "
        "updated_at = :now WHERE id = :id AND deleted = 0 AND revision = :revision",
        {
            "id": instance.id, "spec": msgspec.msgpack.encode(spec), "name": instance.name if name is None else name,
            "hostname": instance.hostname if hostname is None else hostname, "now": now_us(),
            "revision": instance.revision,
        },
        rows=1,
    )  # fmt: skip


async def instance_usages(store: Store, *, start_us: int, end_us: int, project_id: str | None) -> Sequence[Row]:
    """Instances that were there in a period: their sizes and lives, by project and time of creation."""
    return await store.read(
        """SELECT id, project_id, name, vm_state, flavor_id, vcpus, memory_mib, disk_gib, created_at, launched_at,
             terminated_at, spec FROM instances
           WHERE launched_at IS NOT NULL AND launched_at < :end
             AND (terminated_at IS NULL OR terminated_at > :start)
             AND (CAST(:project_id AS TEXT) IS NULL OR project_id = :project_id)
           ORDER BY project_id, launched_at, id""",
        {"start": start_us, "end": end_us, "project_id": project_id},
    )


async def instance_names_by_host(store: Store) -> dict[str, list[tuple[str, str]]]:
    """Host → (id, project id) of every instance there."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in await store.read("SELECT id, name, host FROM instances WHERE deleted = 0 AND host IS NOT NULL"):
        found.setdefault(row["host"], []).append((row["id"], row["name"]))
    return found


async def operations_page(
    store: Store, instance_id: str, *, limit: int, marker: str | None, since_us: int | None, before_us: int | None
) -> Sequence[Row]:
    """Operations of an instance, newest first, after the one whose request id is `marker`."""
    return await store.read(
        """SELECT * FROM operations o WHERE o.instance_id = :id
             AND (CAST(:since AS BIGINT) IS NULL OR o.updated_at >= :since)
             AND (CAST(:before AS BIGINT) IS NULL OR o.updated_at < :before)
             AND (CAST(:marker AS TEXT) IS NULL OR o.turn < (SELECT max(m.turn) FROM operations m
                                               WHERE m.instance_id = :id AND m.request_id = :marker))
           ORDER BY o.turn DESC, o.started_at DESC LIMIT :limit""",
        {
            "id": instance_id, "since": since_us, "marker": marker, "limit": limit,
            "before": None if before_us is None else before_us + SECOND_US,
        },
    )  # fmt: skip


async def operation_of_request(store: Store, instance_id: str, request_id: str) -> Row | None:
    """The operation that a request began on an instance."""
    rows = await store.read(
        "SELECT * FROM operations WHERE instance_id = :id AND request_id = :request_id ORDER BY turn DESC LIMIT 1",
        {"id": instance_id, "request_id": request_id},
    )
    return rows[0] if rows else None
