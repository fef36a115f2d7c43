"""Moves: an instance goes to another host, or to another size. What is remembered until it is confirmed or reverted."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from instar.model.guest import MigrationProgress


class MoveType(StrEnum):
    """The names that the Compute API gives to kinds of migrations."""

    RESIZE = "resize"
    MIGRATION = "migration"
    LIVE = "live-migration"
    EVACUATION = "evacuation"


class MoveStatus(StrEnum):
    """How far a migration is, in the Compute API's words."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    PRE_MIGRATING = "pre-migrating"
    MIGRATING = "migrating"
    POST_MIGRATING = "post-migrating"
    FINISHED = "finished"
    CONFIRMED = "confirmed"
    REVERTED = "reverted"
    COMPLETED = "completed"
    DONE = "done"
    CANCELLED = "cancelled"
    ERROR = "error"


IN_PROGRESS = frozenset(
    {
        MoveStatus.QUEUED, MoveStatus.PREPARING, MoveStatus.RUNNING, MoveStatus.PRE_MIGRATING, MoveStatus.MIGRATING,
        MoveStatus.POST_MIGRATING,
    }
)  # fmt: skip


class Migration(msgspec.Struct, frozen=True):
    """The record of one move, as admins see it. `id` is the number that the API shows; times are microseconds, UTC."""

    id: int
    uuid: str
    instance_id: str
    operation_id: str
    type: MoveType
    status: MoveStatus
    source_host: str
    dest_host: str | None
    old_flavor_id: str
    new_flavor_id: str
    user_id: str
    project_id: str
    created_at: int
    updated_at: int
    progress: MigrationProgress = MigrationProgress()


def migration_from_row(row: Mapping[str, Any]) -> Migration:
    """A Migration from a row of the table `moves`."""
    values = {name: row[name] for name in Migration.__struct_fields__}
    values["type"] = MoveType(values["type"])
    values["status"] = MoveStatus(values["status"])
    values["progress"] = _decode_progress(values["progress"])
    return Migration(**values)


_decode_progress = msgspec.msgpack.Decoder(MigrationProgress).decode
