"""SQL of the instance row: the writes of the engine and the reads of operations. Lists are in `instance_queries.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from instar.clock import now_us
from instar.errors import InstarError, NotFound, QuotaExceeded, TaskStateConflict, WrongState
from instar.model.instance import Instance, InstanceFacts, InstanceSpec, instance_from_row
from instar.model.states import TaskState, VmState
from instar.store.contract import Statement, Store, Value

_INSERT = """
INSERT INTO instances (id, project_id, user_id, name, hostname, vm_state, task_state, power_state, host,
    availability_zone, flavor_id, image_id, key_name, group_id, addresses, created_at, updated_at, launched_at,
    terminated_at, deleted, locked_by, reservation_id, vcpus, memory_mib, disk_gib, epoch, turn, revision, spec, facts)
VALUES (:id, :project_id, :user_id, :name, :hostname, :vm_state, :task_state, :power_state, NULL,
    :availability_zone, :flavor_id, :image_id, :key_name, :group_id, '', :created_at, :updated_at, NULL,
    NULL, 0, NULL, :reservation_id, :vcpus, :memory_mib, :disk_gib, 0, 1, 0, :spec, :facts)
"""

# What an operation may change in the row, by column. Everything else is the API's.
CHANGEABLE = frozenset(
    {
        "vm_state", "power_state", "host", "availability_zone", "launched_at", "terminated_at", "deleted", "facts",
        "addresses", "locked_by", "flavor_id", "image_id", "vcpus", "memory_mib", "disk_gib", "spec", "name", "hostname",
        "progress", "maybe_on",
    }
)  # fmt: skip


def instance_insert(instance: Instance) -> Statement:
    spec = instance.spec
    return Statement(
        _INSERT,
        {
            "id": instance.id, "project_id": instance.project_id, "user_id": instance.user_id, "name": instance.name,
            "hostname": instance.hostname, "vm_state": instance.vm_state.value,
            "task_state": instance.task_state.value if instance.task_state else None,
            "power_state": int(instance.power_state), "availability_zone": instance.availability_zone,
            "flavor_id": spec.flavor.id, "image_id": (spec.image.id or None) if spec.image else None,
            "key_name": spec.key_name, "group_id": spec.group_id, "created_at": instance.created_at,
            "updated_at": instance.updated_at, "reservation_id": instance.reservation_id,
            "vcpus": spec.flavor.vcpus, "memory_mib": spec.flavor.memory_mib,
            "disk_gib": spec.flavor.root_gib + spec.flavor.ephemeral_gib,
            "spec": msgspec.msgpack.encode(spec), "facts": msgspec.msgpack.encode(instance.facts),
        },
        rows=1,
    )  # fmt: skip


def instance_mark(instance: Instance, task: TaskState | None, *, refusal: WrongState) -> Statement:
    """The first task_state of an accepted operation, if the instance still is as the API has seen it."""
    return Statement(
        """UPDATE instances SET task_state = :task, turn = turn + 1, updated_at = :now
           WHERE id = :id AND deleted = 0 AND vm_state = :vm_state
             AND task_state IS NOT DISTINCT FROM :was_task""",
        {
            "id": instance.id, "task": task.value if task else None, "now": now_us(),
            "vm_state": instance.vm_state.value,
            "was_task": instance.task_state.value if instance.task_state else None,
        },
        rows=1,
        error=refusal,
    )  # fmt: skip


def instance_is_idle(instance_id: str, *, refusal: WrongState) -> Statement:
    """Nothing is in flight on the instance, else `refusal` is raised."""
    return Statement(
        """UPDATE instances SET turn = turn WHERE id = :id AND NOT EXISTS
           (SELECT 1 FROM operations o WHERE o.instance_id = :id AND o.finished_at IS NULL)""",
        {"id": instance_id},
        rows=1,
        error=refusal,
    )


def instance_turn(instance: Instance) -> Statement:
    """Stands behind `instance_mark`. Raises WriteConflict where another operation was accepted since it was read."""
    return Statement(
        "UPDATE instances SET turn = turn WHERE id = :id AND turn = :turn",
        {"id": instance.id, "turn": instance.turn + 1},
        rows=1,
    )


def instance_mark_deleting(instance_id: str, task: TaskState) -> Statement:
    """Delete may come at any time, whatever the task; a second delete finds the row as it wants it. A delete for good
    takes over from a soft one."""
    return Statement(
        """UPDATE instances SET task_state = :task, turn = turn + 1, updated_at = :now
           WHERE id = :id AND deleted = 0 AND task_state IS DISTINCT FROM 'deleting'
             AND task_state IS DISTINCT FROM :task""",
        {"id": instance_id, "task": task.value, "now": now_us()},
        rows=1,
    )


def instance_grow(instance_id: str, vcpus: int, memory_mib: int) -> Statement:
    """The instance counts for so much more in its project's usage, which was added in the same transaction."""
    return Statement(
        "UPDATE instances SET vcpus = vcpus + :vcpus, memory_mib = memory_mib + :memory_mib WHERE id = :id",
        {"id": instance_id, "vcpus": vcpus, "memory_mib": memory_mib},
        rows=1,
    )


@lru_cache(maxsize=256)
def _change_sql(columns: tuple[str, ...], *, with_task: bool = True) -> str:
    assert CHANGEABLE.issuperset(columns), columns
    sets = "".join(f"{column} = :{column}, " for column in columns)
    if not with_task:
        return f"UPDATE instances SET {sets}updated_at = :now WHERE id = :id"  # noqa: S608 - columns are CHANGEABLE
    return (
        f"UPDATE instances SET {sets}task_state = :task, updated_at = :now "  # noqa: S608 - columns are CHANGEABLE
        "WHERE id = :id AND task_state IS NOT DISTINCT FROM :was_task"
    )


def instance_change(
    instance_id: str, was_task: TaskState | None, task: TaskState | None, changes: Mapping[str, Value]
) -> Statement:
    """Compare-and-swap on task_state: raises TaskStateConflict where another one stands."""
    columns = tuple(sorted(changes))
    params: dict[str, Value] = dict(changes)
    params |= {
        "id": instance_id, "task": task.value if task else None, "now": now_us(),
        "was_task": was_task.value if was_task else None,
    }  # fmt: skip
    expected = was_task.value if was_task else "none"
    return Statement(_change_sql(columns), params, 1, TaskStateConflict(id=instance_id, expected=expected))


def instance_change_beside(instance_id: str, changes: Mapping[str, Value]) -> Statement:
    """What an operation without a task_state changes: the task_state may belong to one that waits for its turn."""
    sql = _change_sql(tuple(sorted(changes)), with_task=False)
    return Statement(sql, {**changes, "id": instance_id, "now": now_us()}, rows=1)


def instance_change_spec(instance: Instance, spec: InstanceSpec) -> Statement:
    """What the user asked for is another now (a resize, a rebuild).

    Raises WriteConflict when somebody else changed the spec since `instance` was read."""
    flavor = spec.flavor
    return Statement(
        """UPDATE instances SET spec = :spec, revision = revision + 1, flavor_id = :flavor_id, image_id = :image_id,
             key_name = :key_name, disk_gib = :disk_gib, updated_at = :now
           WHERE id = :id AND deleted = 0 AND revision = :revision""",
        {
            "id": instance.id, "spec": msgspec.msgpack.encode(spec), "revision": instance.revision,
            "flavor_id": flavor.id, "image_id": (spec.image.id or None) if spec.image else None, "key_name": spec.key_name,
            "disk_gib": flavor.root_gib + flavor.ephemeral_gib, "now": now_us(),
        },
        rows=1,
    )  # fmt: skip


def instance_count(instance_id: str, vcpus: int, memory_mib: int) -> tuple[Statement, ...]:
    """What the instance counts for in its project's usage; again with the same numbers changes nothing."""
    params: dict[str, Value] = {"id": instance_id, "vcpus": vcpus, "memory_mib": memory_mib}
    return (
        Statement(
            """UPDATE project_usage SET cores = cores + :vcpus - (SELECT vcpus FROM instances WHERE id = :id),
                 ram_mib = ram_mib + :memory_mib - (SELECT memory_mib FROM instances WHERE id = :id)
               WHERE project_id = (SELECT project_id FROM instances WHERE id = :id AND deleted = 0)""",
            params,
        ),
        Statement("UPDATE instances SET vcpus = :vcpus, memory_mib = :memory_mib WHERE id = :id", params),
    )


def instance_take_epoch(operation_id: str) -> Statement:
    """The instance has the epoch under which its operation has just changed hands; returns its row. Raises WriteConflict
    where that epoch was given already."""
    mine = "(SELECT o.{} FROM operations o WHERE o.id = :id)"
    return Statement(
        f"UPDATE instances SET epoch = {mine.format('epoch')} "  # noqa: S608 - constants only
        f"WHERE id = {mine.format('instance_id')} AND epoch < {mine.format('epoch')} RETURNING *",
        {"id": operation_id},
        rows=1,
    )


def instance_hold(instance_id: str) -> Statement:
    """Nobody accepts an operation for the instance until the commit: what stands behind it sees all that were accepted."""
    return Statement("UPDATE instances SET turn = turn WHERE id = :id", {"id": instance_id}, rows=1)


def instance_set_states(instance_id: str, vm_state: VmState) -> Statement:
    """An admin's reset: the state as told, no task, whatever it was."""
    return Statement(
        "UPDATE instances SET vm_state = :vm_state, task_state = NULL, turn = turn + 1, updated_at = :now "
        "WHERE id = :id AND deleted = 0",
        {"id": instance_id, "vm_state": vm_state.value, "now": now_us()},
        rows=1,
        error=NotFound(kind="Instance", id=instance_id),
    )


def instance_lock(instance_id: str, locked_by: str | None, spec: InstanceSpec, revision: int) -> Statement:
    return Statement(
        "UPDATE instances SET locked_by = :locked_by, spec = :spec, revision = revision + 1, updated_at = :now "
        "WHERE id = :id AND deleted = 0 AND revision = :revision",
        {
            "id": instance_id, "locked_by": locked_by, "spec": msgspec.msgpack.encode(spec), "now": now_us(),
            "revision": revision,
        },
        rows=1,
    )  # fmt: skip


def instance_power_sync(
    instance: Instance, *, vm_state: VmState, power_state: int
) -> Statement:
    """What the hypervisor says wins, unless an operation began meanwhile (then nothing is changed)."""
    return Statement(
        """UPDATE instances SET vm_state = :vm_state, power_state = :power_state, updated_at = :now
           WHERE id = :id AND deleted = 0 AND task_state IS NULL AND vm_state = :was AND turn = :turn
             AND NOT EXISTS (SELECT 1 FROM operations o WHERE o.instance_id = :id AND o.finished_at IS NULL)""",
        {
            "id": instance.id, "vm_state": vm_state.value, "power_state": power_state, "now": now_us(),
            "was": instance.vm_state.value, "turn": instance.turn,
        },
        rows=1,
    )  # fmt: skip


async def instance_fetch(store: Store, instance_id: str) -> Instance:
    """The instance, deleted or not. Raises NotFound."""
    rows = await store.read("SELECT * FROM instances WHERE id = :id", {"id": instance_id})
    if not rows:
        raise NotFound(kind="Instance", id=instance_id)
    return instance_from_row(rows[0])  # type: ignore[arg-type]


async def instances_of_host(store: Store, host: str) -> list[Instance]:
    """Instances that are on this host by the record."""
    rows = await store.read("SELECT * FROM instances WHERE host = :host AND deleted = 0", {"host": host})
    return [instance_from_row(row) for row in rows]  # type: ignore[arg-type]


async def instances_about_host(store: Store, host: str) -> list[Instance]:
    """Instances that are on this host by the record, and those that may have come to it: see `Instance.maybe_on`."""
    rows = await store.read(
        "SELECT * FROM instances WHERE host = :host AND deleted = 0 "
        "UNION ALL SELECT * FROM instances WHERE maybe_on = :host AND deleted = 0",
        {"host": host},
    )
    return [instance_from_row(row) for row in rows]  # type: ignore[arg-type]


async def instances_in_state(store: Store, state: VmState, *, after: str, limit: int) -> list[Instance]:
    """Idle instances in this state, by their ids, from behind `after` on (empty: from the first)."""
    rows = await store.read(
        "SELECT * FROM instances WHERE vm_state = :state AND deleted = 0 AND task_state IS NULL AND id > :after "
        "AND NOT EXISTS (SELECT 1 FROM operations o WHERE o.instance_id = instances.id AND o.finished_at IS NULL) "
        "ORDER BY id LIMIT :limit",
        {"state": state.value, "after": after, "limit": limit},
    )
    return [instance_from_row(row) for row in rows]  # type: ignore[arg-type]


async def instance_places(store: Store, instance_ids: Sequence[str]) -> dict[str, tuple[str, int, bool]]:
    """(host, epoch, whether an operation is in flight) of those of these instances that are on a host."""
    if not instance_ids:
        return {}
    params: dict[str, Value] = {f"i{number}": instance_id for number, instance_id in enumerate(instance_ids)}
    names = ", ".join(f":{name}" for name in params)
    rows = await store.read(
        "SELECT id, host, epoch, task_state IS NOT NULL OR EXISTS (SELECT 1 FROM operations o "  # noqa: S608 - our names
        "WHERE o.instance_id = instances.id AND COALESCE(o.finished_at, 0) = 0) AS busy "
        f"FROM instances WHERE id IN ({names}) AND host IS NOT NULL AND deleted = 0",
        params,
    )
    return {row["id"]: (row["host"], row["epoch"], bool(row["busy"])) for row in rows}


async def instances_existing(store: Store) -> dict[str, str | None]:
    """Every instance that is not deleted: id → host. For the audit."""
    rows = await store.read("SELECT id, host FROM instances WHERE deleted = 0")
    return {row["id"]: row["host"] for row in rows}


# --- what a project uses ------------------------------------------------------------------------------------------

_USAGE_COLUMNS = {"instances": "instances", "cores": "cores", "ram": "ram_mib"}
_USAGE_TAKE = """
INSERT INTO project_usage (project_id, instances, cores, ram_mib) SELECT :project_id, :instances, :cores, :ram
    WHERE (:instances_limit < 0 OR :instances <= :instances_limit)
      AND (:cores_limit < 0 OR :cores <= :cores_limit) AND (:ram_limit < 0 OR :ram <= :ram_limit)
ON CONFLICT (project_id) DO UPDATE SET instances = project_usage.instances + :instances,
    cores = project_usage.cores + :cores, ram_mib = project_usage.ram_mib + :ram
    WHERE (:instances_limit < 0 OR project_usage.instances + :instances <= :instances_limit)
      AND (:cores_limit < 0 OR project_usage.cores + :cores <= :cores_limit)
      AND (:ram_limit < 0 OR project_usage.ram_mib + :ram <= :ram_limit)
"""


class UsageFull(InstarError):
    """Some of what was wanted has no room in the project's limits."""


def usage_take(project_id: str, wanted: Mapping[str, int], limits: Mapping[str, int]) -> Statement:
    """Take instances, cores and ram at once, if the limits (-1: none) have room for all of them. Raises UsageFull: with
    `usage_ensure` and `usage_add` it is found out which has none."""
    params: dict[str, Value] = {"project_id": project_id}
    for name in _USAGE_COLUMNS:
        params |= {name: wanted[name], f"{name}_limit": limits[name]}
    return Statement(_USAGE_TAKE, params, 1, UsageFull())


def usage_ensure(project_id: str) -> Statement:
    return Statement(
        "INSERT INTO project_usage VALUES (:project_id, 0, 0, 0) ON CONFLICT DO NOTHING", {"project_id": project_id}
    )


def usage_add(project_id: str, resource: str, amount: int, limit: int) -> Statement:
    """Take `amount` of instances, cores or ram if the limit (-1: none) has room. Raises QuotaExceeded."""
    column = _USAGE_COLUMNS[resource]
    return Statement(
        f"UPDATE project_usage SET {column} = {column} + :amount "  # noqa: S608 - one of three names
        f"WHERE project_id = :project_id AND (:limit < 0 OR {column} + :amount <= :limit)",
        {"project_id": project_id, "amount": amount, "limit": limit},
        rows=1,
        error=QuotaExceeded(resource=resource, requested=amount, used="?", limit=limit),
    )


def usage_give_back(instance_id: str) -> Statement:
    """What a deleted instance used. Stands before the row is marked deleted, in the same transaction."""
    return Statement(
        """UPDATE project_usage SET instances = instances - 1,
             cores = cores - (SELECT vcpus FROM instances WHERE id = :id),
             ram_mib = ram_mib - (SELECT memory_mib FROM instances WHERE id = :id)
           WHERE project_id = (SELECT project_id FROM instances WHERE id = :id AND deleted = 0)""",
        {"id": instance_id},
    )


async def usage_fetch(store: Store, project_id: str) -> dict[str, int]:
    """What the project uses: instances, cores, ram (MiB)."""
    rows = await store.read("SELECT * FROM project_usage WHERE project_id = :id", {"id": project_id})
    if not rows:
        return {"instances": 0, "cores": 0, "ram": 0}
    return {"instances": rows[0]["instances"], "cores": rows[0]["cores"], "ram": rows[0]["ram_mib"]}


def encode_facts(facts: InstanceFacts) -> bytes:
    return msgspec.msgpack.encode(facts)


def addresses_text(facts: InstanceFacts) -> str:
    """The column that the ip filter searches."""
    addresses: list[Any] = [ip.ip_address for port in facts.ports for ip in port.definition.fixed_ips]
    return " ".join(addresses)
