"""SQL of server groups. Called by the Compute API and the scheduler. Members are the instances whose group_id it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from instar.errors import NotFound, QuotaExceeded
from instar.store.conditions import any_of
from instar.store.contract import Row, Statement, Store, Value

POLICIES = ("affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity")
_decode_rules = msgspec.msgpack.Decoder(dict[str, Any]).decode


class ServerGroup(msgspec.Struct, frozen=True):
    """A group as records have it. `rules`: `max_server_per_host` for anti-affinity (1 when it is not given)."""

    id: str
    project_id: str
    user_id: str
    name: str
    policy: str
    rules: dict[str, Any]
    created_at: int
    members: tuple[str, ...] = ()


class GroupHosts(msgspec.Struct, frozen=True):
    """What scheduling needs of a group: host → how many other members have a claim on it."""

    policy: str
    max_per_host: int
    members: dict[str, int]


def server_group_create(group: ServerGroup) -> Statement:
    return Statement(
        """INSERT INTO server_groups (id, project_id, user_id, name, policy, rules, created_at, max_per_host)
           VALUES (:id, :project_id, :user_id, :name, :policy, :rules, :created_at, :max_per_host)""",
        {
            "id": group.id, "project_id": group.project_id, "user_id": group.user_id, "name": group.name,
            "policy": group.policy, "rules": msgspec.msgpack.encode(group.rules), "created_at": group.created_at,
            "max_per_host": int(group.rules.get("max_server_per_host", 1)),
        },
        rows=1,
    )  # fmt: skip


def server_group_delete(group_id: str) -> tuple[Statement, ...]:
    """The group is gone; its members stay, without a group. Raises NotFound."""
    params = {"id": group_id}
    return (
        Statement("DELETE FROM server_groups WHERE id = :id", params, 1, NotFound(kind="Server group", id=group_id)),
        Statement("UPDATE instances SET group_id = NULL WHERE group_id = :id", params),
    )


async def server_group_fetch(store: Store, group_id: str) -> ServerGroup:
    """One group with its members, oldest first. Raises NotFound."""
    rows = await store.read("SELECT * FROM server_groups WHERE id = :id", {"id": group_id})
    if not rows:
        raise NotFound(kind="Server group", id=group_id)
    members = await store.read(
        "SELECT id FROM instances WHERE group_id = :id AND deleted = 0 ORDER BY created_at, id", {"id": group_id}
    )
    return _group(rows[0], tuple(row["id"] for row in members))


async def server_group_list(
    store: Store, *, project_id: str | None, limit: int, offset: int = 0
) -> list[ServerGroup]:
    """Groups of a project (None: of all), oldest first, with their members."""
    mine = "" if project_id is None else "WHERE project_id = :project_id"
    page = f"SELECT * FROM server_groups {mine} ORDER BY created_at, id LIMIT :limit OFFSET :offset"  # noqa: S608
    params: dict[str, Value] = {"limit": limit, "offset": offset}
    if project_id is not None:
        params["project_id"] = project_id
    rows = await store.read(page, params)
    found = await store.read(
        f"""SELECT i.group_id, i.id FROM instances i JOIN ({page}) g ON g.id = i.group_id
            WHERE i.deleted = 0 ORDER BY i.created_at, i.id""",  # noqa: S608 - the same constants
        params,
    )
    members: dict[str, list[str]] = {}
    for row in found:
        members.setdefault(row["group_id"], []).append(row["id"])
    return [_group(row, tuple(members.get(row["id"], ()))) for row in rows]


async def server_group_count(store: Store, project_id: str) -> int:
    rows = await store.read("SELECT COUNT(*) AS n FROM server_groups WHERE project_id = :id", {"id": project_id})
    return int(rows[0]["n"])


async def server_group_hosts(store: Store, group_id: str, *, besides: str) -> GroupHosts | None:
    """Where the members of the group are, `besides` one instance; None when there is no such group."""
    rows = await store.read(
        """SELECT g.policy, g.max_per_host, c.host, COUNT(DISTINCT c.instance_id) AS members
           FROM server_groups g
           LEFT JOIN instances i ON i.group_id = g.id AND i.deleted = 0 AND i.id <> :besides
           LEFT JOIN claims c ON c.instance_id = i.id
           WHERE g.id = :id GROUP BY g.policy, g.max_per_host, c.host""",
        {"id": group_id, "besides": besides},
    )
    if not rows:
        return None
    members = {row["host"]: row["members"] for row in rows if row["host"] is not None}
    return GroupHosts(rows[0]["policy"], rows[0]["max_per_host"], members)


async def hosts_of_instances(store: Store, instance_ids: Sequence[str], *, project_id: str) -> Mapping[str, str]:
    """Instance → host where it has a claim, of those of these instances that the project has."""
    params: dict[str, Value] = {"project_id": project_id}
    chosen = any_of("i.id", instance_ids, params, "i")
    rows = await store.read(
        f"""SELECT c.instance_id, c.host FROM claims c JOIN instances i ON i.id = c.instance_id
            WHERE i.project_id = :project_id AND {chosen}""",  # noqa: S608 - our own names
        params,
    )
    return {row["instance_id"]: row["host"] for row in rows}


def _group(row: Row, members: tuple[str, ...]) -> ServerGroup:
    return ServerGroup(
        row["id"], row["project_id"], row["user_id"], row["name"], row["policy"], _decode_rules(row["rules"]),
        row["created_at"], members,
    )  # fmt: skip


def server_group_room(group_id: str, new: int, limit: int) -> Statement:
    """The group takes `new` more members, if the limit (-1: none) has room. Stands before they are inserted."""
    return Statement(
        """UPDATE server_groups SET name = name WHERE id = :id
             AND (:limit < 0 OR :limit >= :new +
               (SELECT COUNT(*) FROM instances i WHERE i.group_id = :id AND i.deleted = 0))""",
        {"id": group_id, "new": new, "limit": limit},
        rows=1,
        error=QuotaExceeded(resource="server_group_members", requested=new, used="?", limit=limit),
        alone=f"server group {group_id}",
    )
