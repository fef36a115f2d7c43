"""SQL of the hosts: what they have, when they reported, and what an admin said of them.

Called by the scheduler's host table and by the Compute API's services and hypervisors. Claims are in `claims.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec

from instar.errors import Conflict, NotFound
from instar.model.guest import HostInventory
from instar.store.contract import Row, Statement, Store
from instar.store.many_names import in_groups


class Capacity(msgspec.Struct, frozen=True):
    """What may be claimed on a host: after the reserve, times the allocation ratio."""

    vcpus: int
    memory_mib: int
    disk_gib: int


def host_report(name: str, inventory: HostInventory, capacity: Capacity, now_us: int) -> Statement:
    """The host has this now. One that was never seen is made, with ids of its own; claims stay as they are."""
    return Statement(
        """INSERT INTO hosts (name, service_id, hypervisor_id, inventory, vcpus_capacity, memory_capacity_mib,
             disk_capacity_gib, vcpus_claimed, memory_claimed_mib, disk_claimed_gib, instances_claimed, disabled,
             disabled_reason, forced_down, created_at, reported_at)
           VALUES (:name, :service_id, :hypervisor_id, :inventory, :vcpus, :memory_mib, :disk_gib, 0, 0, 0, 0, 0,
             NULL, 0, :now, :now)
           ON CONFLICT (name) DO UPDATE SET inventory = excluded.inventory, vcpus_capacity = excluded.vcpus_capacity,
             memory_capacity_mib = excluded.memory_capacity_mib, disk_capacity_gib = excluded.disk_capacity_gib,
             reported_at = excluded.reported_at""",
        {
            "name": name, "service_id": str(uuid.uuid4()), "hypervisor_id": str(uuid.uuid4()),
            "inventory": msgspec.msgpack.encode(inventory), "vcpus": capacity.vcpus,
            "memory_mib": capacity.memory_mib, "disk_gib": capacity.disk_gib, "now": now_us,
        },
        rows=1,
    )  # fmt: skip


def host_touch(names: Sequence[str], now_us: int) -> list[Statement]:
    """These hosts have reported, and nothing else of them is new."""
    return [
        Statement(f"UPDATE hosts SET reported_at = :now WHERE name IN ({marks})", params | {"now": now_us})  # noqa: S608
        for marks, params in in_groups(names)
    ]


async def host_list(store: Store) -> Sequence[Row]:
    """Every host with all that is known of it, by name."""
    return await store.read("SELECT * FROM hosts ORDER BY name")


async def host_totals_list(store: Store) -> Sequence[Row]:
    """Of every host what changes without it: what is claimed, and what an admin said."""
    return await store.read(
        """SELECT name, vcpus_claimed, memory_claimed_mib, disk_claimed_gib, instances_claimed, disabled,
             disabled_reason, forced_down FROM hosts"""
    )


async def host_busy_list(store: Store) -> dict[str, int]:
    """Host → instances on it that have an operation in flight."""
    rows = await store.read(
        """SELECT host, COUNT(*) AS busy FROM instances
           WHERE host IS NOT NULL AND task_state IS NOT NULL AND deleted = 0 GROUP BY host"""
    )
    return {row["host"]: row["busy"] for row in rows}


async def host_fetch(store: Store, name: str) -> Row:
    """One host. Raises NotFound."""
    rows = await store.read("SELECT * FROM hosts WHERE name = :name", {"name": name})
    if not rows:
        raise NotFound(kind="Host", id=name)
    return rows[0]


def host_set_disabled(name: str, disabled: bool, reason: str | None) -> Statement:
    """No new instance comes to a disabled host. Raises NotFound."""
    return Statement(
        "UPDATE hosts SET disabled = :disabled, disabled_reason = :reason WHERE name = :name",
        {"name": name, "disabled": int(disabled), "reason": reason if disabled else None},
        1,
        NotFound(kind="Host", id=name),
    )


def host_set_forced_down(name: str, forced_down: bool) -> Statement:
    """An admin knows better than the reports that the host is down. Raises NotFound."""
    return Statement(
        "UPDATE hosts SET forced_down = :forced_down WHERE name = :name",
        {"name": name, "forced_down": int(forced_down)},
        1,
        NotFound(kind="Host", id=name),
    )


def host_delete(name: str) -> tuple[Statement, ...]:
    """Forget a host that has nothing claimed on it (one that still reports comes back). Raises Conflict otherwise."""
    params = {"name": name}
    in_use = Conflict(f"Host {name} is unknown or still has instances.")
    return (
        Statement("DELETE FROM aggregate_hosts WHERE host = :name", params),
        Statement("DELETE FROM host_boots WHERE host = :name", params),
        Statement("DELETE FROM drain_moves WHERE host = :name", params),
        Statement("DELETE FROM drains WHERE host = :name", params),
        Statement(
            """DELETE FROM hosts WHERE name = :name AND NOT EXISTS (SELECT 1 FROM claims c WHERE c.host = :name)
               AND NOT EXISTS (SELECT 1 FROM instances i WHERE (i.host = :name OR i.maybe_on = :name) AND i.deleted = 0)""",
            params,
            1,
            in_use,
        ),
    )
