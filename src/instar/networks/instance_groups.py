"""Security groups of a server's ports, changed all at once: what the Compute API's actions on groups need."""

from __future__ import annotations

import msgspec

from instar.clock import now_us
from instar.errors import Conflict, NotFound, UnknownReference
from instar.networks.failures import ChangedMeanwhile, SecurityGroupNotFound
from instar.networks.filter_refresh import FilterChanges
from instar.networks.security_groups import chosen_groups, ensure_default_group
from instar.store import networks as sql
from instar.store.contract import Statement, Store, WriteConflict
from instar.store.network_records import PORTS
from instar.store.security_groups import groups_of_project

ATTEMPTS_MAX = 10


async def change_instance_groups(
    store: Store, refresh: FilterChanges, instance_id: str, name: str, *, project_id: str, member: bool
) -> str:
    """As the contract says of `set_security_group`."""
    group_id, group_name = await _group(store, name, project_id)
    for _ in range(ATTEMPTS_MAX):
        ports = [bound.port for bound in await sql.ports_of_instances(store, [instance_id])]
        secured = [port for port in ports if port.port_security]
        if not secured:
            raise NotFound(f"Instance {instance_id} has no port that a security group could be applied to.")
        others = [port for port in secured if (group_id in port.security_groups) is not member]
        if not others:
            if member:
                return group_name
            raise NotFound(f"Security group {group_name} is not associated with instance {instance_id}.")
        statements: list[Statement] = []
        for port in others:
            kept = tuple(one for one in port.security_groups if one != group_id)
            groups = (*kept, group_id) if member else kept
            statements.append(PORTS.update(msgspec.structs.replace(port, security_groups=groups, updated_at=now_us())))
            statements.append(
                sql.port_join_group(port.id, group_id, gone=ChangedMeanwhile())
                if member
                else sql.port_leave_group(port.id, group_id)
            )
        try:
            await store.write(*statements, *refresh.noting(members=[group_id], instances=[instance_id]))
        except (WriteConflict, ChangedMeanwhile):
            continue
        refresh.members_changed({group_id}, noted=True)
        refresh.instances_changed({instance_id}, noted=True)
        return group_name
    raise Conflict(f"The ports of instance {instance_id} are being changed by others.")


async def _group(store: Store, name: str, project_id: str) -> tuple[str, str]:
    """Its id and name. Raises SecurityGroupNotFound, UnknownReference where the name is not enough."""
    groups = await groups_of_project(store, project_id)
    try:
        chosen = chosen_groups(groups, (name,))
    except UnknownReference as error:
        if error.message.startswith("Multiple"):
            raise
        raise SecurityGroupNotFound(id=name[:80]) from error
    group_id = chosen[0] if chosen else await ensure_default_group(store, project_id)
    return group_id, next((row["name"] for row in groups if row["id"] == group_id), name)
