"""SQL of claims: what instances hold of a host. The conditional UPDATE is what makes overbooking impossible.

Called by the scheduler. Statement lists, so that they can join another transaction. Rows are locked in one order (group,
claim, host), and each statement sees what was committed before it: so the rules hold on a database with many writers too.
"""

from __future__ import annotations

from collections.abc import Mapping

from instar.errors import InstarError
from instar.store.contract import Statement, Store, Value

_ROOM = """vcpus_claimed + :vcpus <= vcpus_capacity AND memory_claimed_mib + :memory_mib <= memory_capacity_mib
    AND (disk_claimed_gib + :disk_gib <= disk_capacity_gib OR :disk_gib = 0)"""

# Where the host is compared as an expression, no database looks through all claims of the host by its index.
_OTHERS = """FROM claims c JOIN instances i ON i.id = c.instance_id
    WHERE i.group_id = g.id AND i.deleted = 0 AND i.id <> :instance_id"""

_GROUP_KEPT = f"""UPDATE claims SET host = host WHERE id = :id AND NOT EXISTS (
    SELECT 1 FROM instances me JOIN server_groups g ON g.id = me.group_id WHERE me.id = :instance_id AND (
        (g.policy = 'affinity' AND EXISTS (SELECT 1 {_OTHERS} AND c.host <> :host))
        OR (g.policy = 'anti-affinity'
            AND (SELECT COUNT(DISTINCT c.instance_id) {_OTHERS} AND c.host || '' = :host) >= g.max_per_host)))"""  # noqa: S608


def claim_take(
    claim_id: str,
    instance_id: str,
    host: str,
    amounts: Mapping[str, int],
    *,
    taken: InstarError,
    full: InstarError,
    refused: InstarError,
) -> tuple[Statement, ...]:
    """Claim `amounts` (vcpus, memory_mib, disk_gib) on the host. Raises `taken` when the claim stands already, `full` when
    the host has no room, is disabled, forced down or unknown, `refused` when the instance's group forbids the host."""
    params: dict[str, Value] = {"id": claim_id, "instance_id": instance_id, "host": host, **amounts}
    return (
        # Two members of a group queue up here: the second sees the first one's claim.
        Statement(
            """UPDATE server_groups SET created_at = created_at
               WHERE id = (SELECT i.group_id FROM instances i WHERE i.id = :instance_id)""",
            {"instance_id": instance_id},
        ),
        Statement(
            """INSERT INTO claims (id, instance_id, host, vcpus, memory_mib, disk_gib)
               SELECT :id, :instance_id, h.name, :vcpus, :memory_mib, :disk_gib FROM hosts h WHERE h.name = :host""",
            params,
            1,
            full,
            duplicate=taken,
        ),
        Statement(
            f"""UPDATE hosts SET vcpus_claimed = vcpus_claimed + :vcpus,
                  memory_claimed_mib = memory_claimed_mib + :memory_mib,
                  disk_claimed_gib = disk_claimed_gib + :disk_gib, instances_claimed = instances_claimed + 1
                WHERE name = :host AND disabled = 0 AND forced_down = 0 AND {_ROOM}""",  # noqa: S608 - constants only
            {"host": host, **amounts},
            1,
            full,
        ),
        Statement(_GROUP_KEPT, {"id": claim_id, "instance_id": instance_id, "host": host}, 1, refused),
    )


def claim_take_anyway(
    claim_id: str, instance_id: str, host: str, amounts: Mapping[str, int], *, taken: InstarError
) -> tuple[Statement, ...]:
    """The same of an instance that runs on the host already: whether there is room is no question any more. Changes nothing
    where the host is unknown."""
    params: dict[str, Value] = {"id": claim_id, "instance_id": instance_id, "host": host, **amounts}
    return (
        Statement(
            """INSERT INTO claims (id, instance_id, host, vcpus, memory_mib, disk_gib)
               SELECT :id, :instance_id, h.name, :vcpus, :memory_mib, :disk_gib FROM hosts h WHERE h.name = :host""",
            params,
            duplicate=taken,
        ),
        Statement(
            """UPDATE hosts SET vcpus_claimed = vcpus_claimed + :vcpus,
                 memory_claimed_mib = memory_claimed_mib + :memory_mib,
                 disk_claimed_gib = disk_claimed_gib + :disk_gib, instances_claimed = instances_claimed + 1
               WHERE name = :host""",
            {"host": host, **amounts},
        ),
    )


async def claims_of_instance(store: Store, instance_id: str, host: str) -> list[str]:
    """Ids of what the instance has claimed on this host."""
    rows = await store.read(
        "SELECT id FROM claims WHERE instance_id = :id AND host = :host ORDER BY id", {"id": instance_id, "host": host}
    )
    return [row["id"] for row in rows]


def claim_release(claim_id: str) -> tuple[Statement, ...]:
    """Give one claim back; one that is gone already is no error. The last result has what was given back."""
    return _release("id", claim_id)


def claim_release_instance(instance_id: str) -> tuple[Statement, ...]:
    """Give back every claim of an instance."""
    return _release("instance_id", instance_id)


def claim_release_others(instance_id: str, keep_claim_id: str) -> tuple[Statement, ...]:
    """Give back every claim of an instance but one."""
    return _release("instance_id", instance_id, keep_claim_id)


def _release(column: str, value: str, kept: str = "") -> tuple[Statement, ...]:
    params: dict[str, Value] = {"value": value, "kept": kept}
    named = f"{column} = :value AND id <> :kept"
    # A claim that another transaction makes between two of these statements is not ours to delete, for its amounts were not
    # given back: ours are those that the first one turned below zero, which nobody else sees.
    mine = f"FROM claims c WHERE c.{column} = :value AND c.id <> :kept AND c.vcpus < 0"
    here = f"{mine} AND c.host || '' = hosts.name"
    return (
        # Two releases of one claim queue up here: the second finds nothing to give back.
        Statement(f"UPDATE claims SET vcpus = -1 - vcpus WHERE {named} AND vcpus >= 0", params),  # noqa: S608 - one of two names
        Statement(
            f"""UPDATE hosts SET vcpus_claimed = vcpus_claimed - (SELECT COALESCE(SUM(-1 - c.vcpus), 0) {here}),
                  memory_claimed_mib = memory_claimed_mib - (SELECT COALESCE(SUM(c.memory_mib), 0) {here}),
                  disk_claimed_gib = disk_claimed_gib - (SELECT COALESCE(SUM(c.disk_gib), 0) {here}),
                  instances_claimed = instances_claimed - (SELECT COUNT(*) {here})
                WHERE name IN (SELECT c.host {mine})""",  # noqa: S608 - the same
            params,
        ),
        Statement(
            f"DELETE FROM claims WHERE {named} AND vcpus < 0 "  # noqa: S608
            "RETURNING host, -1 - vcpus AS vcpus, memory_mib, disk_gib",
            params,
        ),
    )
