"""SQL of security groups, their rules and members. Called by the network room alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from instar.errors import InstarError
from instar.store.conditions import any_of
from instar.store.contract import Row, Statement, Store, Value
from instar.store.network_records import (
    SECURITY_GROUP_RULES,
    SECURITY_GROUPS,
    SecurityGroupRecord,
    SecurityGroupRuleRecord,
)
from instar.store.networks import QuotaCondition


async def groups_of_project(store: Store, project_id: str) -> Sequence[Row]:
    """id, name, and number = 1 for the default group."""
    return await store.read(
        "SELECT id, name, CASE WHEN default_of IS NULL THEN 0 ELSE 1 END AS number FROM security_groups "
        "WHERE project_id = :project_id",
        {"project_id": project_id},
    )


async def group_rules(store: Store, group_ids: Iterable[str]) -> dict[str, list[SecurityGroupRuleRecord]]:
    """Rules of each group, in the order in which they were made."""
    params: dict[str, Value] = {}
    chosen = any_of("group_id", sorted(set(group_ids)), params, "g")
    rows = await store.read(
        f"SELECT * FROM security_group_rules WHERE {chosen} ORDER BY created_at, id", params  # noqa: S608 - our own names
    )
    found: dict[str, list[SecurityGroupRuleRecord]] = {}
    for row in rows:
        found.setdefault(row["group_id"], []).append(SECURITY_GROUP_RULES.record(row))
    return found


async def group_member_addresses(store: Store, group_ids: Iterable[str]) -> dict[str, list[str]]:
    """Addresses of all ports of each group."""
    params: dict[str, Value] = {}
    chosen = any_of("m.group_id", sorted(set(group_ids)), params, "g")
    rows = await store.read(
        "SELECT m.group_id, a.ip_address FROM port_security_groups m JOIN port_addresses a ON a.port_id = m.port_id "  # noqa: S608
        f"WHERE {chosen}",
        params,
    )
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["group_id"], []).append(row["ip_address"])
    return found


async def group_member_pairs(store: Store, group_ids: Iterable[str]) -> list[Row]:
    """Allowed address pairs of members that have some: group_id, allowed_pairs (JSON)."""
    params: dict[str, Value] = {}
    chosen = any_of("m.group_id", sorted(set(group_ids)), params, "g")
    return list(
        await store.read(
            "SELECT m.group_id, p.allowed_pairs FROM port_security_groups m JOIN ports p ON p.id = m.port_id "  # noqa: S608
            f"WHERE {chosen} AND p.allowed_pairs <> '[]'",
            params,
        )
    )


async def instances_filtered_by(store: Store, changed_rules: set[str], changed_members: set[str]) -> set[str]:
    """Instances on a host whose filters depend on the rules of some groups, or on the members of others."""
    params: dict[str, Value] = {}
    rules = any_of("g.group_id", sorted(changed_rules), params, "r")
    members = any_of("remote_group_id", sorted(changed_members), params, "m")
    rows = await store.read(
        "SELECT DISTINCT p.device_id FROM port_security_groups g JOIN ports p ON p.id = g.port_id "  # noqa: S608
        "WHERE p.position IS NOT NULL AND p.host <> '' "
        f"AND ({rules} OR g.group_id IN (SELECT group_id FROM security_group_rules WHERE {members}))",
        params,
    )
    return {row["device_id"] for row in rows}


def group_insert(
    group: SecurityGroupRecord, rules: Sequence[SecurityGroupRuleRecord], *, guard: str = "",
    params: dict[str, Value] | None = None, error: InstarError | None = None, duplicate: InstarError | None = None,
) -> list[Statement]:  # fmt: skip
    """A group with its first rules. `duplicate`: the project has its default group already."""
    return [
        SECURITY_GROUPS.insert(group, guard=guard, params=params, error=error, duplicate=duplicate),
        *(SECURITY_GROUP_RULES.insert(rule) for rule in rules),
    ]


def group_delete(group_id: str, *, in_use: InstarError) -> Statement:
    """With its rules, and the rules of other groups that name it. Refused with `in_use` while a port is in it."""
    return Statement(
        "DELETE FROM security_groups WHERE id = :id AND NOT EXISTS "
        "(SELECT 1 FROM port_security_groups WHERE group_id = :id)",
        {"id": group_id}, rows=1, error=in_use,
    )  # fmt: skip


async def groups_naming(store: Store, group_id: str) -> set[str]:
    """Groups that have a rule with this remote group."""
    rows = await store.read(
        "SELECT DISTINCT group_id FROM security_group_rules WHERE remote_group_id = :id", {"id": group_id}
    )
    return {row["group_id"] for row in rows}


def rule_insert(
    rule: SecurityGroupRuleRecord, quota: QuotaCondition, *, error: InstarError, duplicate: InstarError
) -> Statement:
    """A rule of a group that is still there (and so is the remote one), within the project's quota; else `error`."""
    guard = quota["guard"] + " AND EXISTS (SELECT 1 FROM security_groups WHERE id = :group_id)"  # noqa: S608 - our own text
    if rule.remote_group_id is not None:
        guard += " AND EXISTS (SELECT 1 FROM security_groups WHERE id = :remote_group_id)"
    return SECURITY_GROUP_RULES.insert(rule, guard=guard, params=quota["params"], error=error, duplicate=duplicate)


def rule_delete(rule_id: str) -> Statement:
    return Statement("DELETE FROM security_group_rules WHERE id = :id", {"id": rule_id})
