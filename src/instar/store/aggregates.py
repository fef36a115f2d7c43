"""SQL of host aggregates, and of the availability zones that they make. Called by the Compute API and the scheduler."""

from __future__ import annotations

import msgspec

from instar.errors import Conflict, NotFound
from instar.store.contract import Row, Statement, Store, Value
from instar.store.quotas import counting_lock

DEFAULT_ZONE = "nova"  # of hosts that are in no zone: the name that clients expect
_decode_metadata = msgspec.msgpack.Decoder(dict[str, str]).decode


class Aggregate(msgspec.Struct, frozen=True):
    """A group of hosts. With a zone, its hosts are that zone's. Times are microseconds since the epoch."""

    id: int
    uuid: str
    name: str
    availability_zone: str | None
    metadata: dict[str, str]
    created_at: int
    updated_at: int | None
    hosts: tuple[str, ...] = ()


async def aggregate_create(store: Store, *, uuid: str, name: str, zone: str | None, now_us: int) -> Aggregate:
    """Make an aggregate without hosts. Raises Conflict when the name is taken."""
    _, result = await store.write(
        counting_lock("aggregates"),
        Statement(
            """INSERT INTO aggregates (id, uuid, name, availability_zone, metadata, created_at, updated_at)
               VALUES ((SELECT COALESCE(MAX(a.id), 0) + 1 FROM aggregates a), :uuid, :name, :zone, :metadata, :now,
                 NULL) RETURNING *""",
            {"uuid": uuid, "name": name, "zone": zone, "metadata": msgspec.msgpack.encode({}), "now": now_us},
            1,
            duplicate=Conflict(f"Aggregate {name} already exists."),
        )
    )
    return _aggregate(result.rows[0], ())


async def aggregate_list(store: Store) -> list[Aggregate]:
    """All aggregates with their hosts, by id."""
    rows = await store.read("SELECT * FROM aggregates ORDER BY id")
    hosts: dict[int, list[str]] = {}
    for row in await store.read("SELECT aggregate_id, host FROM aggregate_hosts ORDER BY host"):
        hosts.setdefault(row["aggregate_id"], []).append(row["host"])
    return [_aggregate(row, tuple(hosts.get(row["id"], ()))) for row in rows]


async def aggregate_fetch(store: Store, aggregate_id: int) -> Aggregate:
    """One aggregate with its hosts. Raises NotFound."""
    rows = await store.read("SELECT * FROM aggregates WHERE id = :id", {"id": aggregate_id})
    if not rows:
        raise _unknown(aggregate_id)
    hosts = await store.read(
        "SELECT host FROM aggregate_hosts WHERE aggregate_id = :id ORDER BY host", {"id": aggregate_id}
    )
    return _aggregate(rows[0], tuple(row["host"] for row in hosts))


def aggregate_update(aggregate: Aggregate, now_us: int) -> tuple[Statement, ...]:
    """Name, zone and metadata as given. Raises NotFound, Conflict when the name is taken, or when the new zone would put
    one of its hosts into two zones."""
    values: dict[str, Value] = {
        "id": aggregate.id, "name": aggregate.name, "zone": aggregate.availability_zone, "now": now_us,
        "metadata": msgspec.msgpack.encode(aggregate.metadata),
    }  # fmt: skip
    return (
        counting_lock("aggregates"),
        Statement(
            """UPDATE aggregates SET name = :name, availability_zone = :zone, metadata = :metadata, updated_at = :now
               WHERE id = :id""",
            values,
            1,
            _unknown(aggregate.id),
            Conflict(f"Aggregate {aggregate.name} already exists."),
        ),
        _one_zone_each(aggregate.id),
    )


def aggregate_add_host(aggregate_id: int, host: str, now_us: int) -> tuple[Statement, ...]:
    """Raises NotFound (aggregate or host), Conflict when the host is in it, or is in another zone."""
    params: dict[str, Value] = {"id": aggregate_id, "host": host}
    now: dict[str, Value] = {"id": aggregate_id, "now": now_us}
    return (
        counting_lock("aggregates"),
        Statement("UPDATE aggregates SET updated_at = :now WHERE id = :id", now, 1, _unknown(aggregate_id)),
        Statement(
            "INSERT INTO aggregate_hosts (aggregate_id, host) SELECT :id, h.name FROM hosts h WHERE h.name = :host",
            params,
            1,
            NotFound(kind="Host", id=host),
            Conflict(f"Host {host} is already in aggregate {aggregate_id}."),
        ),
        _one_zone_each(aggregate_id),
    )


def aggregate_remove_host(aggregate_id: int, host: str, now_us: int) -> tuple[Statement, ...]:
    """Raises NotFound when the host is not in the aggregate."""
    return (
        Statement(
            "DELETE FROM aggregate_hosts WHERE aggregate_id = :id AND host = :host",
            {"id": aggregate_id, "host": host},
            1,
            NotFound(kind="Host", id=host),
        ),
        Statement("UPDATE aggregates SET updated_at = :now WHERE id = :id", {"id": aggregate_id, "now": now_us}),
    )


def aggregate_delete(aggregate_id: int) -> Statement:
    """Raises NotFound, Conflict when it still has hosts."""
    return Statement(
        """DELETE FROM aggregates WHERE id = :id
           AND NOT EXISTS (SELECT 1 FROM aggregate_hosts h WHERE h.aggregate_id = :id)""",
        {"id": aggregate_id},
        1,
        Conflict(f"Aggregate {aggregate_id} is unknown or still has hosts."),
    )


async def zone_list(store: Store) -> dict[str, tuple[str, ...]]:
    """Availability zone → its hosts, by name; the default zone has the hosts that are in no other."""
    rows = await store.read(
        """SELECT h.name, COALESCE(MIN(a.availability_zone), :default_zone) AS zone FROM hosts h
           LEFT JOIN aggregate_hosts ah ON ah.host = h.name LEFT JOIN aggregates a ON a.id = ah.aggregate_id
           GROUP BY h.name ORDER BY h.name""",
        {"default_zone": DEFAULT_ZONE},
    )
    zones: dict[str, list[str]] = {DEFAULT_ZONE: []}
    for row in rows:
        zones.setdefault(row["zone"], []).append(row["name"])
    return {zone: tuple(hosts) for zone, hosts in sorted(zones.items()) if hosts or zone == DEFAULT_ZONE}


def _one_zone_each(aggregate_id: int) -> Statement:
    """Refuses the transaction when a host of the aggregate is in two zones."""
    return Statement(
        """UPDATE aggregates SET updated_at = updated_at WHERE id = :id AND NOT EXISTS (
             SELECT 1 FROM aggregate_hosts mine
             JOIN aggregate_hosts other ON other.host = mine.host JOIN aggregates a ON a.id = other.aggregate_id
             WHERE mine.aggregate_id = :id AND a.availability_zone <> aggregates.availability_zone)""",
        {"id": aggregate_id},
        1,
        Conflict(f"A host of aggregate {aggregate_id} is in another availability zone."),
    )


def _unknown(aggregate_id: int) -> NotFound:
    return NotFound(kind="Aggregate", id=aggregate_id)


def _aggregate(row: Row, hosts: tuple[str, ...]) -> Aggregate:
    return Aggregate(
        row["id"], row["uuid"], row["name"], row["availability_zone"], _decode_metadata(row["metadata"]),
        row["created_at"], row["updated_at"], hosts,
    )  # fmt: skip
