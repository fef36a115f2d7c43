"""SQL of what hosts are still to be told of ports: noted with the change itself, forgotten when hosts have been told.

Each note is a row of its own: an upsert of one row per group would have every build of a project wait for the same row.
Called by the network room alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple
from uuid import uuid4

from instar.store.conditions import any_of
from instar.store.contract import Statement, Store, Value

RULES, MEMBERS, INSTANCES, NETWORKS = "rules", "members", "instances", "networks"
LATE = "late"  # instances that could not be told yet: busy, or their host is away
FRESH = (RULES, MEMBERS, INSTANCES, NETWORKS)
READ_MAX = 5000


class Notes(NamedTuple):
    """What is noted: ids of the rows, and their subjects by kind."""

    ids: list[str]
    subjects: dict[str, set[str]]


def filter_change_insert(kind: str, subjects: Iterable[str]) -> list[Statement]:
    return [
        Statement(
            "INSERT INTO filter_changes (id, kind, subject) VALUES (:id, :kind, :subject)",
            {"id": uuid4().hex, "kind": kind, "subject": subject},
        )
        for subject in sorted(set(subjects))
    ]


def filter_change_of_ports(where: str, params: Mapping[str, Value]) -> Statement:
    """Members of the groups of some ports change: to come before these go. `where` is a condition on ports as `p`."""
    return Statement(
        "INSERT INTO filter_changes (id, kind, subject) SELECT DISTINCT :note || m.group_id, 'members', m.group_id "  # noqa: S608 - our own text
        f"FROM port_security_groups m JOIN ports p ON p.id = m.port_id WHERE {where}",
        {**params, "note": uuid4().hex + " "},
    )


async def filter_changes_fetch(store: Store, kinds: Iterable[str]) -> Notes:
    """Some of what is noted, of these kinds."""
    params: dict[str, Value] = {"most": READ_MAX}
    chosen = any_of("kind", sorted(kinds), params, "k")
    rows = await store.read(f"SELECT id, kind, subject FROM filter_changes WHERE {chosen} LIMIT :most", params)  # noqa: S608
    subjects: dict[str, set[str]] = {}
    for row in rows:
        subjects.setdefault(row["kind"], set()).add(row["subject"])
    return Notes([row["id"] for row in rows], subjects)


def filter_changes_forget(ids: Iterable[str]) -> Statement:
    params: dict[str, Value] = {}
    chosen = any_of("id", list(ids), params, "n")
    return Statement(f"DELETE FROM filter_changes WHERE {chosen}", params)  # noqa: S608
