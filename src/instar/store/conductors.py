"""SQL of conductors: who lives, who is the keeper, and which operations wait to be taken. Called by the engine.

A conductor is registered as long as it has its row: it is its lease. Who finds that a beat has stood still removes the row,
if it still stands there with that beat; so a conductor that beats again is either registered or knows that it is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from instar.clock import now_us
from instar.errors import InstarError
from instar.store.contract import Row, Statement, Store

KEEPER = "keeper"


class KeeperLost(InstarError):
    """This conductor is not the keeper any more: nothing was written."""

    template = "Another conductor is the keeper now."


def conductor_register(conductor_id: str) -> Statement:
    return Statement("INSERT INTO conductors VALUES (:id, 0, :now)", {"id": conductor_id, "now": now_us()}, rows=1)


def conductor_beat(conductor_id: str) -> Statement:
    """A sign of life. Others watch the number move by their own clocks, so no two clocks are ever compared."""
    return Statement("UPDATE conductors SET beat = beat + 1 WHERE id = :id", {"id": conductor_id}, rows=1)


def conductor_remove(conductor_id: str) -> Statement:
    return Statement("DELETE FROM conductors WHERE id = :id", {"id": conductor_id})


def conductor_evict(conductor_id: str, beat: int) -> Statement:
    """One whose beat stood still has no lease any more. Touches no row where it has beaten since, or is gone."""
    return Statement("DELETE FROM conductors WHERE id = :id AND beat = :beat", {"id": conductor_id, "beat": beat})


def conductors_evict_others(conductor_id: str) -> Statement:
    """For one who knows that it is alone."""
    return Statement("DELETE FROM conductors WHERE id <> :id", {"id": conductor_id})


async def conductors_fetch(store: Store) -> dict[str, int]:
    """Every registered conductor with its beat."""
    return {row["id"]: row["beat"] for row in await store.read("SELECT id, beat FROM conductors")}


# --- the keeper -----------------------------------------------------------------------------------------------------


def keeper_take(conductor_id: str) -> Statement:
    """Touches a row when nobody else holds it who is registered, and this one is."""
    return Statement(
        """INSERT INTO leases (name, holder) SELECT :name, c.id FROM conductors c WHERE c.id = :id
           ON CONFLICT (name) DO UPDATE SET holder = excluded.holder
             WHERE leases.holder = excluded.holder
                OR NOT EXISTS (SELECT 1 FROM conductors o WHERE o.id = leases.holder)""",
        {"name": KEEPER, "id": conductor_id},
    )


def keeper_guard(conductor_id: str) -> Statement:
    """Stands before what the keeper writes. Raises KeeperLost."""
    return Statement(
        "UPDATE leases SET holder = holder WHERE name = :name AND holder = :id",
        {"name": KEEPER, "id": conductor_id},
        rows=1,
        error=KeeperLost(),
    )


def keeper_leave(conductor_id: str) -> Statement:
    return Statement(
        "UPDATE leases SET holder = '' WHERE name = :name AND holder = :id", {"name": KEEPER, "id": conductor_id}
    )


async def keeper_fetch(store: Store) -> str | None:
    """The conductor that is the keeper, or was it last."""
    rows = await store.read("SELECT holder FROM leases WHERE name = :name", {"name": KEEPER})
    return rows[0]["holder"] or None if rows else None


# --- operations and who has them ------------------------------------------------------------------------------------


async def operations_to_take(store: Store, limit: int) -> Sequence[Row]:
    """Operations that nobody registered owns and that need not wait for an older one of their instance: id and owner (one
    that is gone, or NULL), the oldest first."""
    return await store.read(
        """SELECT o.id, o.owner FROM operations o
           WHERE o.finished_at IS NULL AND (o.owner IS NULL OR o.owner NOT IN (SELECT c.id FROM conductors c))
             AND NOT EXISTS (SELECT 1 FROM operations e WHERE e.instance_id = o.instance_id
                             AND e.finished_at IS NULL AND e.turn < o.turn)
           ORDER BY o.started_at, o.turn LIMIT :limit""",
        {"limit": limit},
    )


async def operations_owned(store: Store, conductor_id: str) -> dict[str, str | None]:
    """What this conductor owns and has not ended: id → the action that takes over from it, if one does."""
    rows = await store.read(
        "SELECT id, cancelled_by FROM operations WHERE owner = :id AND finished_at IS NULL", {"id": conductor_id}
    )
    return {row["id"]: row["cancelled_by"] for row in rows}
