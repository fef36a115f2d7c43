"""Security groups as this room makes and reads them: the default group, names, and rules as a host enforces them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

import msgspec

from instar.clock import now_us
from instar.errors import UnknownReference
from instar.model.network import SecurityRule
from instar.networks.addresses import collapsed
from instar.networks.failures import ChangedMeanwhile
from instar.store.contract import Row, Statement, Store
from instar.store.network_records import PortRecord, SecurityGroupRecord, SecurityGroupRuleRecord
from instar.store.security_groups import (
    group_insert,
    group_member_addresses,
    group_member_pairs,
    group_rules,
    groups_of_project,
)

DEFAULT = "default"
LARGE_GROUP = 100  # addresses
RECENT_S = 3.0
_PAIRS = msgspec.json.Decoder(tuple[tuple[str, str], ...])


def new_rule(
    group: SecurityGroupRecord,
    direction: str,
    ethertype: str,
    *,
    protocol: str | None = None,
    port_min: int | None = None,
    port_max: int | None = None,
    remote_ip_prefix: str | None = None,
    remote_group_id: str | None = None,
    description: str = "",
) -> SecurityGroupRuleRecord:
    now = now_us()
    said = (direction, ethertype, protocol, port_min, port_max, remote_ip_prefix, remote_group_id)
    return SecurityGroupRuleRecord(
        id=str(uuid4()), group_id=group.id, project_id=group.project_id, direction=direction, ethertype=ethertype,
        protocol=protocol, port_min=port_min, port_max=port_max, remote_ip_prefix=remote_ip_prefix,
        remote_group_id=remote_group_id, description=description,
        identity=" ".join("-" if part is None else str(part) for part in said), created_at=now, updated_at=now,
    )  # fmt: skip


def new_group(
    project_id: str, name: str, description: str = "", *, is_default: bool = False
) -> tuple[SecurityGroupRecord, list[SecurityGroupRuleRecord]]:
    """A group with the rules that it begins with: everything may leave; into the default one come its own members."""
    now = now_us()
    group = SecurityGroupRecord(
        id=str(uuid4()), project_id=project_id, name=name, description=description,
        default_of=project_id if is_default else None, created_at=now, updated_at=now,
    )  # fmt: skip
    rules = [new_rule(group, "egress", family) for family in ("IPv4", "IPv6")]
    if is_default:
        rules += [new_rule(group, "ingress", family, remote_group_id=group.id) for family in ("IPv4", "IPv6")]
    return group, rules


def default_group_statements(project_id: str) -> tuple[str, list[Statement]]:
    """The id of a new default group, and what makes it. Raises ChangedMeanwhile when somebody else has made one."""
    group, rules = new_group(project_id, DEFAULT, "Default security group", is_default=True)
    return group.id, group_insert(group, rules, duplicate=ChangedMeanwhile())


async def ensure_default_group(store: Store, project_id: str) -> str:
    """The id of the project's default group, made at its first use."""
    found = _default_of(await groups_of_project(store, project_id))
    if found is not None:
        return found
    group_id, statements = default_group_statements(project_id)
    try:
        await store.write(*statements)
    except ChangedMeanwhile:
        found = _default_of(await groups_of_project(store, project_id))
        if found is None:
            raise
        return found
    return group_id


def _default_of(groups: Sequence[Row]) -> str | None:
    return next((row["id"] for row in groups if row["number"]), None)


def chosen_groups(groups: Sequence[Row], names: Sequence[str]) -> tuple[str, ...] | None:
    """Ids of the groups that a user named by name or id; None: the default one is named, and is not there yet.

    Raises UnknownReference for a name that the project has not, or has more than once."""
    chosen: list[str] = []
    for name in names:
        if name == DEFAULT:
            default = _default_of(groups)
            if default is None:
                return None
            found = [default]
        else:
            found = [row["id"] for row in groups if name == row["id"]] or [
                row["id"] for row in groups if name == row["name"]
            ]
        if len(found) > 1:
            raise UnknownReference(
                f"Multiple security groups found matching '{name}'. Use an ID to be more specific.",
                kind="Security group", name=name,
            )  # fmt: skip
        if not found:
            raise UnknownReference(kind="Security group", name=name)
        chosen += found
    return tuple(dict.fromkeys(chosen))


async def host_rules(
    store: Store, ports: Sequence[PortRecord], members: RemoteMembers
) -> dict[str, tuple[SecurityRule, ...]]:
    """The rules of each of these ports (by id), remote groups resolved to the addresses of their members."""
    groups = {group for port in ports if port.port_security for group in port.security_groups}
    if not groups:
        return {}
    rules = await group_rules(store, groups)
    remote = {rule.remote_group_id for of_group in rules.values() for rule in of_group if rule.remote_group_id}
    cidrs = await members.cidrs(remote)
    ready = {group: tuple(_host_rule(rule, cidrs) for rule in of_group) for group, of_group in rules.items()}
    return {
        port.id: tuple(rule for group in port.security_groups for rule in ready.get(group, ()))
        for port in ports
        if port.port_security
    }


Cidrs = Mapping[tuple[str, str], tuple[str, ...]]  # (group, ethertype) → where its members are


class RemoteMembers:
    """Where the members of groups are, as rules that name a group need it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def cidrs(self, groups: set[str]) -> Cidrs:
        """Addresses of members, with the pairs that they may use besides."""
        if not groups:
            return {}
        found, _ = await self._read(groups)
        return found

    async def _read(self, groups: set[str]) -> tuple[dict[tuple[str, str], tuple[str, ...]], set[str]]:
        """Also says which groups are large."""
        addresses = await group_member_addresses(self._store, groups)
        found = {(group, "IPv4"): collapsed(of_group) for group, of_group in addresses.items()}
        for row in await group_member_pairs(self._store, groups):
            for cidr, _ in _PAIRS.decode(row["allowed_pairs"]):
                key = (row["group_id"], "IPv6" if ":" in cidr else "IPv4")
                if cidr not in found.get(key, ()):
                    found[key] = (*found.get(key, ()), cidr)
        return found, {group for group, of_group in addresses.items() if len(of_group) > LARGE_GROUP}


class RecentMembers(RemoteMembers):
    """The same, but members of a large group are as they were a moment ago: reading thousands of addresses for each build
    of one more would cost more than the rest of the build. Whoever uses it has the instance refreshed afterwards, as the
    filters of all the other members are."""

    def __init__(self, store: Store, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__(store)
        self._monotonic = monotonic
        self._known: dict[str, tuple[float, Cidrs]] = {}  # large groups alone

    async def cidrs(self, groups: set[str]) -> Cidrs:
        now = self._monotonic()
        self._known = {group: known for group, known in self._known.items() if now - known[0] < RECENT_S}
        known = {group: self._known[group][1] for group in groups if group in self._known}
        found, large = await self._read(groups - known.keys()) if groups - known.keys() else ({}, set())
        for group in large:
            self._known[group] = (now, {key: cidrs for key, cidrs in found.items() if key[0] == group})
        return {**found, **{key: cidrs for of_group in known.values() for key, cidrs in of_group.items()}}

    @property
    def in_use(self) -> bool:
        """Whether there is a large group: what was said of it may be out of date."""
        return bool(self._known)


def _host_rule(rule: SecurityGroupRuleRecord, members: Mapping[tuple[str, str], tuple[str, ...]]) -> SecurityRule:
    remote: tuple[str, ...] = (rule.remote_ip_prefix,) if rule.remote_ip_prefix else ()
    if rule.remote_group_id:
        remote = members.get((rule.remote_group_id, rule.ethertype), ())
    return SecurityRule(
        direction=rule.direction, ethertype=rule.ethertype, protocol=rule.protocol, port_min=rule.port_min,
        port_max=rule.port_max, remote_cidrs=remote, remote_nobody=bool(rule.remote_group_id) and not remote,
    )  # fmt: skip
