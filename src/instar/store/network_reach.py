"""SQL of where networks reach: which hosts have ports of them, and who must be told when these change.

A host has a network while a port of it is bound there (`host`) or on its way there (`next_host`). Called by the network
room alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from instar.store.conditions import any_of
from instar.store.contract import Statement, Store, Value

_OWN = "SELECT network_id FROM ports WHERE device_id = :instance_id AND position IS NOT NULL"
_FIRST_HERE = "NOT EXISTS (SELECT 1 FROM ports p WHERE p.network_id = o.network_id AND p.host = :host) OR"
# From the instance's few ports on, by its index: from the network on it would walk through all ports of that.
_GROW = """
UPDATE networks SET reach = reach + 1 WHERE id IN (
    SELECT o.network_id FROM ports o WHERE o.device_id = :instance_id AND o.position IS NOT NULL AND (
        o.next_host <> '' OR (o.host <> :host AND ({first_here} (o.host <> '' AND NOT EXISTS (
            SELECT 1 FROM ports p WHERE p.network_id = o.network_id AND p.host = o.host AND p.device_id <> :instance_id
        ))))))
RETURNING id
"""


def reach_grow(instance_id: str, host: str) -> tuple[Statement, ...]:
    """To come before the instance's ports are bound to `host` (empty: to none, or they go). The networks that a host
    gets or loses by this grow in `reach`; the last returns their ids."""
    sql = _GROW.format(first_here=_FIRST_HERE if host else "")
    params: dict[str, Value] = {"instance_id": instance_id, "host": host}
    return _leaving_one_by_one(f"{_OWN} AND host <> '' AND host <> :host", params), Statement(sql, params)


def reach_grow_new(network_id: str, host: str) -> Statement:
    """To come before a new port of the network is made on `host`: the network grows in `reach` if the host gets it by
    this, and its id is returned."""
    return Statement(
        """UPDATE networks SET reach = reach + 1 WHERE id = :network_id AND NOT EXISTS (
             SELECT 1 FROM ports p WHERE p.network_id = :network_id AND p.host = :host) RETURNING id""",
        {"network_id": network_id, "host": host},
    )


def _leaving_one_by_one(networks: str, params: Mapping[str, Value]) -> Statement:
    """Of two ports that are a network's last on a host, and leave it at once, the second sees that the first is gone."""
    return Statement(f"UPDATE networks SET reach = reach WHERE id IN ({networks})", params)  # noqa: S608 - constants only


def reach_grow_without(instance_id: str, port_id: str) -> tuple[Statement, ...]:
    """To come before this port of the instance goes: its network grows in `reach` if a host loses it by this; the last
    returns the network's id then."""
    params: dict[str, Value] = {"instance_id": instance_id, "port_id": port_id}
    return (
        _leaving_one_by_one(f"{_OWN} AND id = :port_id AND host <> ''", params),
        Statement(
            """UPDATE networks SET reach = reach + 1 WHERE id IN (
                 SELECT o.network_id FROM ports o WHERE o.id = :port_id AND o.device_id = :instance_id
                   AND o.position IS NOT NULL AND (o.next_host <> '' OR (o.host <> '' AND NOT EXISTS (
                     SELECT 1 FROM ports p WHERE p.network_id = o.network_id AND p.host = o.host AND p.id <> o.id))))
               RETURNING id""",
            params,
        ),
    )


def ports_bind_ahead(instance_id: str, next_host: str, now: int) -> list[Statement]:
    """The ports will be on `next_host` (empty: they stay where they are). The first returns the networks' ids."""
    params: dict[str, Value] = {"instance_id": instance_id, "next_host": next_host}
    return [
        Statement(
            f"UPDATE networks SET reach = reach + 1 WHERE id IN ({_OWN} AND next_host <> :next_host) "  # noqa: S608
            "RETURNING id",
            params,
        ),
        Statement(
            "UPDATE ports SET next_host = :next_host, revision = revision + 1, updated_at = :now "
            "WHERE device_id = :instance_id AND position IS NOT NULL AND next_host <> :next_host",
            {**params, "now": now},
        ),
    ]


async def network_hosts(store: Store, network_id: str) -> frozenset[str]:
    """Hosts that have the network. Jumps from host to host in the index: a host may have many thousand ports."""
    rows = await store.read(
        """WITH RECURSIVE seen(host) AS (
             SELECT MIN(host) FROM ports WHERE network_id = :id AND host > ''
             UNION ALL
             SELECT (SELECT MIN(p.host) FROM ports p WHERE p.network_id = :id AND p.host > seen.host)
               FROM seen WHERE seen.host IS NOT NULL)
           SELECT host FROM seen WHERE host IS NOT NULL
           UNION SELECT next_host FROM ports WHERE network_id = :id AND next_host <> ''""",
        {"id": network_id},
    )
    return frozenset(row["host"] for row in rows)


async def instances_to_tell(store: Store, network_ids: Iterable[str]) -> set[str]:
    """One instance for each of the networks' hosts, by which its definition is told; one that is idle if there is one,
    since the others are told only when their operation has ended."""
    params: dict[str, Value] = {}
    chosen = any_of("p.network_id", sorted(network_ids), params, "n")
    rows = await store.read(
        "SELECT MIN(CASE WHEN i.task_state IS NULL THEN p.device_id END) AS idle, MIN(p.device_id) AS busy "  # noqa: S608
        f"FROM ports p JOIN instances i ON i.id = p.device_id WHERE {chosen} AND p.position IS NOT NULL "
        "AND p.host <> '' GROUP BY p.network_id, p.host",
        params,
    )
    return {row["idle"] or row["busy"] for row in rows}


class _Addressed(msgspec.Struct):
    """Of a host's inventory, what is wanted here."""

    host_ip: str = ""


async def host_addresses(store: Store) -> dict[str, str]:
    """Host → the address that it reported."""
    rows = await store.read("SELECT name, inventory FROM hosts")
    decoder = msgspec.msgpack.Decoder(_Addressed)
    return {row["name"]: decoder.decode(row["inventory"]).host_ip for row in rows}
