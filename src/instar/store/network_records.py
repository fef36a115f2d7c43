"""Rows of the network tables as records, and the statements that are the same for each table.

Used by `networks.py` and `security_groups.py` beside this file, and read by the network room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

import msgspec

from instar.errors import InstarError
from instar.model.network import FixedIp
from instar.store.conditions import any_of
from instar.store.contract import Row, Statement, Store, Value, WriteConflict


class NetworkRecord(msgspec.Struct, frozen=True):
    id: str
    project_id: str
    name: str
    description: str
    shared: bool
    admin_state_up: bool
    mtu: int
    port_security: bool
    nat: bool
    created_at: int
    updated_at: int
    tags: tuple[str, ...] = ()
    revision: int = 0
    vni: int = 0


class SubnetRecord(msgspec.Struct, frozen=True):
    """`allocation_pools` are (first, last), both included; `host_routes` are (destination, next hop)."""

    id: str
    network_id: str
    project_id: str
    name: str
    description: str
    cidr: str
    gateway_ip: str | None
    dhcp_enabled: bool
    dhcp_ip: str | None
    dns_nameservers: tuple[str, ...]
    host_routes: tuple[tuple[str, str], ...]
    allocation_pools: tuple[tuple[str, str], ...]
    created_at: int
    updated_at: int
    tags: tuple[str, ...] = ()
    revision: int = 0


class PortRecord(msgspec.Struct, frozen=True):
    """`host` is empty while the port is not bound, `position` None while no instance has it."""

    id: str
    network_id: str
    project_id: str
    mac_address: str
    created_at: int
    updated_at: int
    fixed_ips: tuple[FixedIp, ...] = ()
    security_groups: tuple[str, ...] = ()
    name: str = ""
    description: str = ""
    admin_state_up: bool = True
    device_id: str = ""
    device_owner: str = ""
    host: str = ""
    dns_name: str = ""
    port_security: bool = True
    allowed_pairs: tuple[tuple[str, str], ...] = ()
    made_by_us: bool = False
    position: int | None = None
    nic_tag: str | None = None
    tags: tuple[str, ...] = ()
    revision: int = 0


class SecurityGroupRecord(msgspec.Struct, frozen=True):
    id: str
    project_id: str
    name: str
    description: str
    default_of: str | None
    created_at: int
    updated_at: int
    tags: tuple[str, ...] = ()
    revision: int = 0


class SecurityGroupRuleRecord(msgspec.Struct, frozen=True):
    """`identity` is what the rule says, as one text: see `rule_identity` in the network room."""

    id: str
    group_id: str
    project_id: str
    direction: str
    ethertype: str
    protocol: str | None
    port_min: int | None
    port_max: int | None
    remote_ip_prefix: str | None
    remote_group_id: str | None
    description: str
    identity: str
    created_at: int
    updated_at: int
    revision: int = 0


R = TypeVar("R", bound=msgspec.Struct)


class Table(Generic[R]):
    """One table and its record: the columns are the record's fields, tuples stand as JSON."""

    def __init__(self, name: str, record_type: type[R]) -> None:
        self.name = name
        self.record_type = record_type
        self.columns = record_type.__struct_fields__
        hints = get_type_hints(record_type)
        self._json = {
            column: msgspec.json.Decoder(hints[column]) for column in self.columns if get_origin(hints[column]) is tuple
        }
        self._flags = frozenset(column for column in self.columns if hints[column] is bool)
        numbers = frozenset(column for column in self.columns if hints[column] in (int, bool, int | None))
        # In a SELECT without a table PostgreSQL cannot know the type of a parameter.
        values = ", ".join(f"CAST(:{c} AS BIGINT)" if c in numbers else f"CAST(:{c} AS TEXT)" for c in self.columns)
        self._insert = f"INSERT INTO {name} ({', '.join(self.columns)}) SELECT {values}"
        changes = ", ".join(f"{c} = :{c}" for c in self.columns if c not in ("id", "revision", "created_at"))
        self._update = (
            f"UPDATE {name} SET {changes}, revision = revision + 1 "  # noqa: S608 - our own names
            "WHERE id = :id AND revision = :revision"
        )

    def params(self, record: R) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for column in self.columns:
            value = getattr(record, column)
            if column in self._json:
                value = msgspec.json.encode(value).decode()
            elif column in self._flags:
                value = int(value)
            values[column] = value
        return values

    def record(self, row: Row) -> R:
        values: dict[str, Any] = {column: row[column] for column in self.columns}
        for column, decoder in self._json.items():
            text = values[column]
            values[column] = () if text == "[]" else decoder.decode(text)
        for column in self._flags:
            values[column] = bool(values[column])
        return self.record_type(**values)

    def insert(
        self,
        record: R,
        *,
        guard: str = "",
        params: Mapping[str, Value] | None = None,
        error: InstarError | None = None,
        duplicate: InstarError | None = None,
    ) -> Statement:
        """Insert, only where the condition `guard` holds; else nothing is written and `error` is raised."""
        sql = f"{self._insert} WHERE {guard}" if guard else self._insert
        return Statement(sql, {**self.params(record), **(params or {})}, rows=1, error=error, duplicate=duplicate)

    def update(self, record: R, *, duplicate: InstarError | None = None) -> Statement:
        """Write the whole record, if its row still has the record's revision. Raises WriteConflict."""
        return Statement(self._update, self.params(record), rows=1, error=WriteConflict(), duplicate=duplicate)


NETWORKS = Table("networks", NetworkRecord)
SUBNETS = Table("subnets", SubnetRecord)
PORTS = Table("ports", PortRecord)
SECURITY_GROUPS = Table("security_groups", SecurityGroupRecord)
SECURITY_GROUP_RULES = Table("security_group_rules", SecurityGroupRuleRecord)


# What a project may see of each table: its own, what is shared, and what stands in its networks.
_VISIBLE = {
    "networks": "(project_id = :viewer OR shared = 1)",
    "subnets": "(project_id = :viewer OR network_id IN"
    " (SELECT id FROM networks WHERE shared = 1 OR project_id = :viewer))",
    "ports": "(project_id = :viewer OR network_id IN (SELECT id FROM networks WHERE project_id = :viewer))",
    "security_groups": "project_id = :viewer",
    "security_group_rules": "(project_id = :viewer OR group_id IN"
    " (SELECT id FROM security_groups WHERE project_id = :viewer))",
}


async def record_list(
    store: Store, table: Table[R], *, viewer: str | None, equal: Mapping[str, Sequence[str]] | None = None
) -> list[R]:
    """Records that the project `viewer` may see (None: all), of which each column of `equal` has one of the values."""
    conditions: list[str] = []
    params: dict[str, Value] = {}
    if viewer is not None:
        conditions.append(_VISIBLE[table.name])
        params["viewer"] = viewer
    for index, (column, values) in enumerate((equal or {}).items()):
        if column not in table.columns:
            raise KeyError(column)
        conditions.append(any_of(column, values, params, f"e{index}_"))
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    rows = await store.read(f"SELECT * FROM {table.name}{where} ORDER BY created_at, id", params)  # noqa: S608 - our own names
    return [table.record(row) for row in rows]


async def record_fetch(store: Store, table: Table[R], record_id: str, *, viewer: str | None = None) -> R | None:
    """The record, where the project `viewer` may see it (None: anybody's)."""
    found = await record_list(store, table, viewer=viewer, equal={"id": [record_id]})
    return found[0] if found else None
