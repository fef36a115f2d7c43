"""SQL of networks, subnets, ports and addresses. Called by the network room alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

from instar.errors import InstarError
from instar.store.conditions import any_of
from instar.store.contract import Row, Statement, Store, Value
from instar.store.network_records import (
    NETWORKS,
    PORTS,
    SUBNETS,
    NetworkRecord,
    PortRecord,
    SubnetRecord,
)
from instar.store.quotas import counting_lock

ADMIN_QUOTA = -1  # no limit
ID_CHUNK = 500  # ids in one statement


class BoundPort(NamedTuple):
    """A port with what its network is at: read together."""

    port: PortRecord
    network_revision: int
    network_reach: int


class AllocationFacts(NamedTuple):
    """What must be known before ports of an instance are made, from one read."""

    own_ports: int  # of the instance, already
    networks: dict[str, int]  # id → revision
    ports: dict[str, Row]  # brought by the user: project_id, device_id, network_id in `name`
    groups: list[Row]  # of the project: id, name, number = 1 for the default one
    ports_used: int  # 0 where nothing limits them
    ports_limit: int | None  # None: the setting's


_FACTS = """
SELECT 'own' AS kind, '' AS id, '' AS project_id, '' AS name, COUNT(*) AS number
    FROM ports WHERE device_id = :instance_id AND position IS NOT NULL
UNION ALL SELECT 'used', '', '', '', COUNT(*) FROM ports WHERE project_id = :project_id AND (:counted = 1 OR EXISTS
    (SELECT 1 FROM network_quotas WHERE project_id = :project_id AND resource = 'port'))
UNION ALL SELECT 'limit', '', '', '', hard_limit FROM network_quotas WHERE project_id = :project_id AND resource = 'port'
UNION ALL SELECT 'group', id, project_id, name, CASE WHEN default_of IS NULL THEN 0 ELSE 1 END
    FROM security_groups WHERE project_id = :project_id
UNION ALL SELECT 'network', id, project_id, name, revision FROM networks WHERE {networks}
UNION ALL SELECT 'port', id, device_id, network_id, revision FROM ports WHERE {ports}
"""


async def allocation_facts(
    store: Store, instance_id: str, project_id: str, network_ids: Sequence[str], port_ids: Sequence[str], *, counted: bool
) -> AllocationFacts:
    """One read: the instance's ports, the networks and ports asked for, the project's groups and port quota. `counted`: a
    project without a limit of its own has one all the same, so its ports are counted, which may be many."""
    params: dict[str, Value] = {"instance_id": instance_id, "project_id": project_id, "counted": int(counted)}
    sql = _FACTS.format(networks=any_of("id", network_ids, params, "n"), ports=any_of("id", port_ids, params, "p"))
    rows = await store.read(sql, params)
    numbers = {row["kind"]: row["number"] for row in rows}
    return AllocationFacts(
        own_ports=numbers["own"],
        networks={row["id"]: row["number"] for row in rows if row["kind"] == "network"},
        ports={row["id"]: row for row in rows if row["kind"] == "port"},
        groups=[row for row in rows if row["kind"] == "group"],
        ports_used=numbers["used"],
        ports_limit=numbers.get("limit"),
    )


# --- networks and subnets --------------------------------------------------------------------------------------------


async def network_topology(store: Store, network_ids: Sequence[str]) -> dict[str, tuple[NetworkRecord, list[SubnetRecord]]]:
    """Networks with their subnets, in the order in which these were made, from one snapshot.

    The network's revision is read with the subnets, so that it says exactly which subnets these are."""
    params: dict[str, Value] = {}
    chosen = any_of("n.id", network_ids, params, "n")
    columns = ", ".join(f"s.{column} AS s_{column}" for column in SUBNETS.columns)
    rows = await store.read(
        f"SELECT n.*, {columns} FROM networks n LEFT JOIN subnets s ON s.network_id = n.id "  # noqa: S608 - our own names
        f"WHERE {chosen} ORDER BY s.created_at, s.id",
        params,
    )
    found: dict[str, tuple[NetworkRecord, list[SubnetRecord]]] = {}
    for row in rows:
        _, subnets = found.setdefault(row["id"], (NETWORKS.record(row), []))
        if row["s_id"] is not None:
            subnets.append(SUBNETS.record(_Prefixed(row)))
    return found


class _Prefixed:
    """The subnet's columns of a row of `network_topology`."""

    def __init__(self, row: Row) -> None:
        self._row = row

    def __getitem__(self, column: str) -> object:
        return self._row["s_" + column]


async def networks_usable(store: Store, project_id: str) -> Sequence[Row]:
    """Networks that a server of the project can be put on: its own and the shared ones. id, project_id, nat."""
    return await store.read(
        "SELECT id, project_id, nat FROM networks n WHERE (project_id = :project_id OR shared = 1) AND admin_state_up = 1 "
        "AND EXISTS (SELECT 1 FROM subnets s WHERE s.network_id = n.id)",
        {"project_id": project_id},
    )


async def network_first_nat(store: Store) -> str | None:
    """The network that the cloud made itself at its first start."""
    rows = await store.read("SELECT id FROM networks WHERE nat = 1 ORDER BY created_at, id LIMIT 1")
    return rows[0]["id"] if rows else None


async def subnet_ids(store: Store, network_ids: Sequence[str]) -> dict[str, list[str]]:
    """Ids of the subnets of each network, oldest first."""
    found: dict[str, list[str]] = {}
    for start in range(0, len(network_ids), ID_CHUNK):
        params: dict[str, Value] = {}
        chosen = any_of("network_id", network_ids[start : start + ID_CHUNK], params, "n")
        for row in await store.read(
            f"SELECT id, network_id FROM subnets WHERE {chosen} ORDER BY created_at, id", params  # noqa: S608 - our own names
        ):
            found.setdefault(row["network_id"], []).append(row["id"])
    return found


def network_touch(network_id: str, now: int) -> Statement:
    """The network's revision grows: its subnets change in this transaction."""
    return Statement(
        "UPDATE networks SET revision = revision + 1, updated_at = :now WHERE id = :id", {"id": network_id, "now": now}
    )


def network_at(network_id: str, revision: int, error: InstarError) -> Statement:
    """The network still has the revision that a decision was made on; and it is locked until the end of this
    transaction, so that two such decisions follow each other."""
    return Statement(
        "UPDATE networks SET revision = revision + 1 WHERE id = :id AND revision = :revision",
        {"id": network_id, "revision": revision}, rows=1, error=error,
    )  # fmt: skip


def network_delete(network_id: str, *, in_use: InstarError) -> list[Statement]:
    """With its subnets. Refused with `in_use` while it has ports."""
    params: dict[str, Value] = {"id": network_id}
    return [
        Statement("DELETE FROM subnets WHERE network_id = :id AND NOT EXISTS "
                  "(SELECT 1 FROM ports WHERE network_id = :id)", params, error=in_use),  # a port comes at this moment
        Statement("DELETE FROM networks WHERE id = :id AND NOT EXISTS (SELECT 1 FROM ports WHERE network_id = :id)",
                  params, rows=1, error=in_use),
    ]  # fmt: skip


def network_unshared(network: NetworkRecord, *, error: InstarError) -> Statement:
    """Nobody but the network's project has ports on it, else `error`."""
    return Statement(
        "UPDATE networks SET shared = 0 WHERE id = :id AND NOT EXISTS "
        "(SELECT 1 FROM ports WHERE network_id = :id AND project_id <> :project_id)",
        {"id": network.id, "project_id": network.project_id}, rows=1, error=error,
    )  # fmt: skip


async def instances_of_network(store: Store, network_id: str) -> set[str]:
    """Instances that some host has plugged into this network."""
    rows = await store.read(
        "SELECT DISTINCT device_id FROM ports WHERE network_id = :id AND position IS NOT NULL AND host <> ''",
        {"id": network_id},
    )
    return {row["device_id"] for row in rows}


def subnet_delete(subnet: SubnetRecord, now: int, *, in_use: InstarError) -> list[Statement]:
    """Refused with `in_use` while a port has an address in it."""
    return [
        network_touch(subnet.network_id, now),
        Statement("DELETE FROM subnets WHERE id = :id AND NOT EXISTS "
                  "(SELECT 1 FROM port_addresses WHERE subnet_id = :id)", {"id": subnet.id}, rows=1, error=in_use),
    ]  # fmt: skip


# --- addresses --------------------------------------------------------------------------------------------------------


async def addresses_used(store: Store, subnet_id: str) -> list[str]:
    rows = await store.read("SELECT ip_address FROM port_addresses WHERE subnet_id = :id", {"id": subnet_id})
    return [row["ip_address"] for row in rows]


async def address_is_used(store: Store, subnet_id: str, ip_address: str) -> bool:
    return bool(
        await store.read(
            "SELECT 1 FROM port_addresses WHERE subnet_id = :subnet_id AND ip_address = :ip_address",
            {"subnet_id": subnet_id, "ip_address": ip_address},
        )
    )


def address_take(subnet_id: str, ip_address: str, port_id: str, *, taken: InstarError) -> Statement:
    return Statement(
        "INSERT INTO port_addresses (subnet_id, ip_address, port_id) VALUES (:subnet_id, :ip_address, :port_id)",
        {"subnet_id": subnet_id, "ip_address": ip_address, "port_id": port_id}, rows=1, duplicate=taken,
    )  # fmt: skip


# --- ports ------------------------------------------------------------------------------------------------------------

_OF_INSTANCE = "device_id = :instance_id AND position IS NOT NULL"


def port_insert(
    port: PortRecord, *, network_revision: int | None, limit: int, changed: InstarError, duplicate: InstarError
) -> Statement:
    """A new port, where the network is still as it was seen and the project's quota (`limit`, -1: none) has room."""
    guard = "EXISTS (SELECT 1 FROM networks WHERE id = :network_id"
    params: dict[str, Value] = {}
    if network_revision is not None:
        guard += " AND revision = :network_revision"
        params["network_revision"] = network_revision
    guard += ")"
    if limit >= 0:
        guard += " AND (SELECT COUNT(*) FROM ports WHERE project_id = :project_id) < :port_limit"
        params["port_limit"] = limit
    return PORTS.insert(port, guard=guard, params=params, error=changed, duplicate=duplicate)


def port_join_group(port_id: str, group_id: str, *, gone: InstarError) -> Statement:
    return Statement(
        "INSERT INTO port_security_groups (group_id, port_id) SELECT id, CAST(:port_id AS TEXT) FROM security_groups "
        "WHERE id = :group_id",
        {"group_id": group_id, "port_id": port_id}, rows=1, error=gone,
    )  # fmt: skip


def port_leave_group(port_id: str, group_id: str) -> Statement:
    return Statement(
        "DELETE FROM port_security_groups WHERE port_id = :port_id AND group_id = :group_id",
        {"port_id": port_id, "group_id": group_id},
    )


def port_leave_all(port_id: str) -> list[Statement]:
    """The port has no address and no group; it gets others in the same transaction."""
    return [
        Statement("DELETE FROM port_addresses WHERE port_id = :id", {"id": port_id}),
        Statement("DELETE FROM port_security_groups WHERE port_id = :id", {"id": port_id}),
    ]


def port_claim(port_id: str, instance_id: str, owner: str, position: int, dns_name: str, tag: str | None, now: int,
               *, taken: InstarError) -> Statement:  # fmt: skip
    """A port that the user brought is the instance's now; only one instance can have it."""
    return Statement(
        "UPDATE ports SET device_id = :instance_id, device_owner = :owner, position = :position, dns_name = :dns_name, "
        "nic_tag = :tag, host = '', next_host = '', revision = revision + 1, updated_at = :now "
        "WHERE id = :id AND device_id = ''",
        {"id": port_id, "instance_id": instance_id, "owner": owner, "position": position, "dns_name": dns_name,
         "tag": tag, "now": now}, rows=1, error=taken, duplicate=taken,
    )  # fmt: skip


def ports_bind(instance_id: str, host: str, now: int) -> Statement:
    """`host` empty: the ports belong to no host."""
    return Statement(
        f"UPDATE ports SET host = :host, next_host = '', revision = revision + 1, updated_at = :now "  # noqa: S608
        f"WHERE {_OF_INSTANCE} AND (host <> :host OR next_host <> '') RETURNING security_groups",
        {"instance_id": instance_id, "host": host, "now": now},
    )


def ports_release(instance_id: str, now: int) -> list[Statement]:
    """Those made for the instance are deleted, the others are free. The first tells the groups that lost members."""
    return _released(_OF_INSTANCE, {"instance_id": instance_id}, now)


def port_release(instance_id: str, port_id: str, now: int) -> list[Statement]:
    """As `ports_release`, of one port."""
    return _released(f"{_OF_INSTANCE} AND id = :port_id", {"instance_id": instance_id, "port_id": port_id}, now)


def _released(which: str, params: Mapping[str, Value], now: int) -> list[Statement]:
    return [
        Statement(f"DELETE FROM ports WHERE {which} AND made_by_us = 1 RETURNING security_groups", params),  # noqa: S608
        Statement(
            "UPDATE ports SET device_id = '', device_owner = '', host = '', next_host = '', dns_name = '', "  # noqa: S608
            f"position = NULL, nic_tag = NULL, revision = revision + 1, updated_at = :now WHERE {which}",
            {**params, "now": now},
        ),
    ]


def port_delete(port_id: str, *, in_use: InstarError) -> Statement:
    """Refused with `in_use` while an instance has it."""
    return Statement(
        "DELETE FROM ports WHERE id = :id AND position IS NULL", {"id": port_id}, rows=1, error=in_use
    )


async def ports_of_instances(
    store: Store, instance_ids: Sequence[str]
) -> list[BoundPort]:
    """Ports of instances in the order of their NICs."""
    found: list[BoundPort] = []
    for start in range(0, len(instance_ids), ID_CHUNK):
        params: dict[str, Value] = {}
        chosen = any_of("p.device_id", instance_ids[start : start + ID_CHUNK], params, "i")
        rows = await store.read(
            "SELECT p.*, n.revision AS network_revision, n.reach AS network_reach FROM ports p "  # noqa: S608
            f"JOIN networks n ON n.id = p.network_id WHERE {chosen} AND p.position IS NOT NULL "
            "ORDER BY p.device_id, p.position",
            params,
        )
        found += [BoundPort(PORTS.record(row), row["network_revision"], row["network_reach"]) for row in rows]
    return found


async def port_owners(store: Store) -> dict[str, str]:
    rows = await store.read("SELECT id, device_id FROM ports WHERE position IS NOT NULL")
    return {row["id"]: row["device_id"] for row in rows}


# --- quotas -----------------------------------------------------------------------------------------------------------

_COUNTED = {
    "network": "networks", "subnet": "subnets", "port": "ports", "security_group": "security_groups",
    "security_group_rule": "security_group_rules",
}  # fmt: skip


async def network_quota(store: Store, project_id: str) -> tuple[dict[str, int], dict[str, int]]:
    """Limits that the project has of its own, and what it uses, by the resource names of the Network API."""
    parts = [
        f"SELECT 'used' AS kind, '{resource}' AS resource, COUNT(*) AS number FROM {table} WHERE project_id = :project_id"  # noqa: S608
        for resource, table in _COUNTED.items()
    ]
    parts.append("SELECT 'limit', resource, hard_limit FROM network_quotas WHERE project_id = :project_id")
    rows = await store.read(" UNION ALL ".join(parts), {"project_id": project_id})
    limits = {row["resource"]: row["number"] for row in rows if row["kind"] == "limit"}
    return limits, {row["resource"]: row["number"] for row in rows if row["kind"] == "used"}


class QuotaCondition(TypedDict):
    guard: str
    params: dict[str, Value]


def quota_locks(resource: str, limits: Mapping[str, int]) -> list[Statement]:
    """To come before inserts with `quota_condition`, or `port_insert`: of projects that have a limit."""
    return [counting_lock(f"{resource}:{project_id}") for project_id, limit in sorted(limits.items()) if limit >= 0]


def quota_guard(resource: str) -> str:
    """Condition of an insert: the project has fewer than `:quota_limit` of the resource."""
    return f"(SELECT COUNT(*) FROM {_COUNTED[resource]} WHERE project_id = :project_id) < :quota_limit"  # noqa: S608


def quota_condition(resource: str, limit: int) -> QuotaCondition:
    """The `guard` and `params` of an insert that `limit` (-1: none) restricts."""
    if limit < 0:
        return QuotaCondition(guard="1 = 1", params={})
    return QuotaCondition(guard=quota_guard(resource), params={"quota_limit": limit})


async def network_quota_set(store: Store, project_id: str, limits: dict[str, int]) -> None:
    await store.write(*(
        Statement(
            "INSERT INTO network_quotas (project_id, resource, hard_limit) VALUES (:project_id, :resource, :limit) "
            "ON CONFLICT (project_id, resource) DO UPDATE SET hard_limit = :limit",
            {"project_id": project_id, "resource": resource, "limit": limit},
        )
        for resource, limit in sorted(limits.items())
    ))  # fmt: skip


async def network_quota_reset(store: Store, project_id: str) -> None:
    await store.write(Statement("DELETE FROM network_quotas WHERE project_id = :id", {"id": project_id}))


async def network_quota_projects(store: Store) -> list[str]:
    rows = await store.read("SELECT DISTINCT project_id FROM network_quotas ORDER BY project_id")
    return [row["project_id"] for row in rows]
