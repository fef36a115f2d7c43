"""SQL of drains: hosts that are being emptied. Begun and aborted by the operators' API, worked off by the keeper."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from instar.clock import now_us
from instar.errors import Conflict, NotFound
from instar.store.contract import Row, Statement, Store


class DrainMode(StrEnum):
    """AUTO: what runs is migrated live, what is stopped cold. LIVE and COLD: only so; COLD stops what runs for the move."""

    AUTO = "auto"
    LIVE = "live"
    COLD = "cold"


class DrainStatus(StrEnum):
    RUNNING = "running"
    ABORTING = "aborting"
    DONE = "done"
    ABORTED = "aborted"


class MoveState(StrEnum):
    """AGAIN: the last attempt failed, there will be another. LEFT: it stays, for the reason that is noted."""

    MOVING = "moving"
    AGAIN = "again"
    MOVED = "moved"
    LEFT = "left"


class Drain(msgspec.Struct, frozen=True):
    """Times are microseconds since the epoch. `concurrency` instances are moved at once."""

    host: str
    mode: DrainMode
    concurrency: int
    status: DrainStatus
    started_at: int
    updated_at: int


class DrainMove(msgspec.Struct, frozen=True):
    """What became of one instance. `how`: live, cold, offload, or empty where nothing can be done."""

    host: str
    instance_id: str
    how: str
    status: MoveState
    attempts: int
    reason: str
    updated_at: int


def drain_begin(host: str, mode: DrainMode, concurrency: int) -> tuple[Statement, ...]:
    """Raises Conflict while the host is being drained. What an earlier drain left is tried again."""
    now = now_us()
    return (
        Statement(
            """INSERT INTO drains (host, mode, concurrency, status, started_at, updated_at)
               VALUES (:host, :mode, :concurrency, 'running', :now, :now)
               ON CONFLICT (host) DO UPDATE SET mode = excluded.mode, concurrency = excluded.concurrency,
                 status = excluded.status, started_at = excluded.started_at, updated_at = excluded.updated_at
               WHERE drains.status IN ('done', 'aborted')""",
            {"host": host, "mode": mode.value, "concurrency": concurrency, "now": now},
            rows=1,
            error=Conflict(f"Host {host} is being drained."),
        ),
        Statement("DELETE FROM drain_moves WHERE host = :host", {"host": host}),
    )


def drain_abort(host: str) -> Statement:
    """Nothing more is begun; live migrations in flight are aborted, what moves otherwise comes to its end. Raises Conflict
    where no drain runs."""
    return Statement(
        "UPDATE drains SET status = 'aborting', updated_at = :now WHERE host = :host AND status IN ('running', 'aborting')",
        {"host": host, "now": now_us()},
        rows=1,
        error=Conflict(f"Host {host} is not being drained."),
    )


def drain_end(drain: Drain) -> Statement:
    """It ends in the way in which it was: touches no row where it was aborted meanwhile."""
    ended = DrainStatus.DONE if drain.status is DrainStatus.RUNNING else DrainStatus.ABORTED
    return Statement(
        "UPDATE drains SET status = :ended, updated_at = :now WHERE host = :host AND status = :status",
        {"host": drain.host, "ended": ended.value, "status": drain.status.value, "now": now_us()},
    )


def drain_move_save(move: DrainMove) -> Statement:
    return Statement(
        """INSERT INTO drain_moves (host, instance_id, how, status, attempts, reason, updated_at)
           VALUES (:host, :instance_id, :how, :status, :attempts, :reason, :now)
           ON CONFLICT (host, instance_id) DO UPDATE SET how = excluded.how, status = excluded.status,
             attempts = excluded.attempts, reason = excluded.reason, updated_at = excluded.updated_at""",
        {
            "host": move.host, "instance_id": move.instance_id, "how": move.how, "status": move.status.value,
            "attempts": move.attempts, "reason": move.reason, "now": now_us(),
        },
        rows=1,
    )  # fmt: skip


async def drains_unfinished(store: Store) -> list[Drain]:
    rows = await store.read("SELECT * FROM drains WHERE status IN ('running', 'aborting') ORDER BY host")
    return [_drain(row) for row in rows]


async def drain_fetch(store: Store, host: str) -> Drain:
    """Raises NotFound for a host that was never drained."""
    rows = await store.read("SELECT * FROM drains WHERE host = :host", {"host": host})
    if not rows:
        raise NotFound(kind="Drain of host", id=host)
    return _drain(rows[0])


async def drain_moves_fetch(store: Store, host: str) -> dict[str, DrainMove]:
    """By instance."""
    rows: Sequence[Row] = await store.read("SELECT * FROM drain_moves WHERE host = :host", {"host": host})
    moves = [DrainMove(**_values(row, DrainMove) | {"status": MoveState(row["status"])}) for row in rows]
    return {move.instance_id: move for move in moves}


def _drain(row: Row) -> Drain:
    values = _values(row, Drain)
    return Drain(**values | {"mode": DrainMode(row["mode"]), "status": DrainStatus(row["status"])})


def _values(row: Row, kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: row[name] for name in kind.__struct_fields__}
