"""SQL of the audit and of host recovery: what should be, to be held against what is."""

from __future__ import annotations

from collections.abc import Collection

from instar.store.contract import Row, Statement, Store
from instar.store.many_names import in_groups

AUDITED = """SELECT i.id, i.host, i.maybe_on, i.vm_state, i.task_state, i.epoch, i.facts,
      EXISTS (SELECT 1 FROM operations o WHERE o.instance_id = i.id AND o.finished_at IS NULL) AS busy
    FROM instances i WHERE i.deleted = 0"""

NOT_ON_THE_OTHER = "make sure it is not on the other host"  # a step of evacuations


async def audit_instances(store: Store) -> dict[str, Row]:
    """Every instance that is not deleted: id → (host, maybe_on, vm_state, task_state, facts, busy: has an unfinished
    operation)."""
    return {row["id"]: row for row in await store.read(AUDITED)}


async def audit_instances_among(store: Store, ids: Collection[str]) -> dict[str, Row]:
    """The same of these alone."""
    found: dict[str, Row] = {}
    for marks, params in in_groups(sorted(ids)):
        found |= {row["id"]: row for row in await store.read(f"{AUDITED} AND i.id IN ({marks})", params)}
    return found


async def audit_claims(store: Store) -> list[Row]:
    """Every claim with its instance's id and host."""
    return list(await store.read("SELECT id, instance_id, host, vcpus, memory_mib, disk_gib FROM claims"))


async def audit_host_totals(store: Store) -> list[Row]:
    """Hosts whose claimed totals are not the sum of their claims."""
    return list(
        await store.read(
            """SELECT h.name, h.vcpus_claimed, h.memory_claimed_mib, h.disk_claimed_gib, h.instances_claimed,
                 COALESCE(SUM(c.vcpus), 0) AS vcpus, COALESCE(SUM(c.memory_mib), 0) AS memory_mib,
                 COALESCE(SUM(c.disk_gib), 0) AS disk_gib, COUNT(c.id) AS claims
               FROM hosts h LEFT JOIN claims c ON c.host = h.name
               GROUP BY h.name, h.vcpus_claimed, h.memory_claimed_mib, h.disk_claimed_gib, h.instances_claimed
               HAVING h.vcpus_claimed <> COALESCE(SUM(c.vcpus), 0)
                   OR h.memory_claimed_mib <> COALESCE(SUM(c.memory_mib), 0)
                   OR h.disk_claimed_gib <> COALESCE(SUM(c.disk_gib), 0)
                   OR h.instances_claimed <> COUNT(c.id)"""
        )
    )


async def audit_usage(store: Store) -> list[Row]:
    """Projects whose counted usage is not what their instances use."""
    return list(
        await store.read(
            """SELECT u.project_id, u.instances, u.cores, u.ram_mib, COUNT(i.id) AS real_instances,
                 COALESCE(SUM(i.vcpus), 0) AS real_cores, COALESCE(SUM(i.memory_mib), 0) AS real_ram_mib
               FROM project_usage u LEFT JOIN instances i ON i.project_id = u.project_id AND i.deleted = 0
               GROUP BY u.project_id, u.instances, u.cores, u.ram_mib
               HAVING u.instances <> COUNT(i.id) OR u.cores <> COALESCE(SUM(i.vcpus), 0)
                   OR u.ram_mib <> COALESCE(SUM(i.memory_mib), 0)"""
        )
    )


# The row is held first: whoever changes it meanwhile has committed by the time of the second statement, which sees it all.


def usage_recount(project_id: str) -> tuple[Statement, ...]:
    """Count anew what the project's instances use."""
    counted, params = "FROM instances i WHERE i.project_id = :id AND i.deleted = 0", {"id": project_id}
    return (
        Statement("UPDATE project_usage SET instances = instances WHERE project_id = :id", params),
        Statement(
            f"""UPDATE project_usage SET instances = (SELECT COUNT(*) {counted}),
                  cores = (SELECT COALESCE(SUM(i.vcpus), 0) {counted}),
                  ram_mib = (SELECT COALESCE(SUM(i.memory_mib), 0) {counted})
                WHERE project_id = :id""",  # noqa: S608 - constants only
            params,
        ),
    )


def host_totals_recount(host: str) -> tuple[Statement, ...]:
    """Sum the host's claims anew."""
    claims, params = "FROM claims c WHERE c.host = :host", {"host": host}
    return (
        Statement("UPDATE hosts SET instances_claimed = instances_claimed WHERE name = :host", params),
        Statement(
            f"""UPDATE hosts SET vcpus_claimed = (SELECT COALESCE(SUM(c.vcpus), 0) {claims}),
                  memory_claimed_mib = (SELECT COALESCE(SUM(c.memory_mib), 0) {claims}),
                  disk_claimed_gib = (SELECT COALESCE(SUM(c.disk_gib), 0) {claims}),
                  instances_claimed = (SELECT COUNT(*) {claims})
                WHERE name = :host""",  # noqa: S608 - constants only
            params,
        ),
    )


async def instances_evacuated(store: Store, host: str) -> dict[str, int]:
    """Instances of the host that an evacuation in flight builds elsewhere: id → epoch. One that was not found yet, and may
    be on this host, only once the evacuation has made sure that it is not."""
    rows = await store.read(
        """SELECT i.id, i.epoch FROM instances i JOIN operations o ON o.instance_id = i.id
           WHERE i.deleted = 0 AND o.action = 'evacuate' AND o.finished_at IS NULL
             AND (i.host = :host OR (i.maybe_on = :host AND EXISTS (SELECT 1 FROM steps s
               WHERE s.operation_id = o.id AND s.name = :made_sure AND s.finished_at IS NOT NULL)))""",
        {"host": host, "made_sure": NOT_ON_THE_OTHER},
    )
    return {row["id"]: row["epoch"] for row in rows}


async def host_boots_fetch(store: Store) -> dict[str, str]:
    """Host → the start of the machine that it was last seen in."""
    return {row["host"]: row["boot_id"] for row in await store.read("SELECT host, boot_id FROM host_boots")}


def host_boot_save(host: str, boot_id: str) -> Statement:
    return Statement(
        "INSERT INTO host_boots VALUES (:host, :boot_id) ON CONFLICT (host) DO UPDATE SET boot_id = excluded.boot_id",
        {"host": host, "boot_id": boot_id},
    )
