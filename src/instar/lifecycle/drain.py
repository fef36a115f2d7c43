"""Draining hosts: everything that can go elsewhere does, a few at a time; what cannot is left, with its reason.

A drain that is aborted begins nothing more, and aborts the live migrations that it has in flight: their guests stay. What
was switched off for its move comes to its end, as turning back would keep it off for longer.

What was begun stands in the database before it is asked for, so a drain goes on where it was after any crash. Each move
goes through the same door as a user's. One process does it for all: see `engine/keeper.py`.
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from instar.errors import Conflict, InstarError, NotFound
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.door import Lifecycle
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.repeated import Repeated
from instar.lifecycle.timers import system_context
from instar.model.instance import Instance
from instar.model.move import MoveStatus
from instar.model.states import VmState
from instar.store.drains import (
    Drain,
    DrainMode,
    DrainMove,
    DrainStatus,
    MoveState,
    drain_end,
    drain_move_save,
    drain_moves_fetch,
    drains_unfinished,
)
from instar.store.instances import instance_fetch, instances_of_host
from instar.store.moves import migrations_of_instance
from instar.store.operations import operations_of_instance, operations_waiting

log = structlog.get_logger()

LOOK_EVERY_S = 1.0
ATTEMPTS_MAX = 2
LIVE, COLD, OFFLOAD = "live", "cold", "offload"
_BY_STATE: dict[DrainMode, dict[VmState, str]] = {
    DrainMode.AUTO: {
        VmState.ACTIVE: LIVE, VmState.PAUSED: LIVE, VmState.STOPPED: COLD, VmState.SHELVED: OFFLOAD,
    },
    DrainMode.LIVE: {VmState.ACTIVE: LIVE, VmState.PAUSED: LIVE},
    DrainMode.COLD: {VmState.ACTIVE: COLD, VmState.STOPPED: COLD, VmState.SHELVED: OFFLOAD},
}  # fmt: skip


class Drainer(Repeated):
    def __init__(self, cloud: Cloud, lifecycle: Lifecycle) -> None:
        self._store = cloud.store
        self._lifecycle = lifecycle
        super().__init__("drain", self.look, every_s=LOOK_EVERY_S)

    async def look(self) -> None:
        """Bring every drain further."""
        for drain in await drains_unfinished(self._store):
            await self._go_on(drain)

    async def _go_on(self, drain: Drain) -> None:
        moves = await drain_moves_fetch(self._store, drain.host)
        moving = 0
        for move in moves.values():
            if move.status is MoveState.MOVING:
                settled = moves[move.instance_id] = await self._settle(drain, move)
                moving += settled.status is MoveState.MOVING
        if drain.status is DrainStatus.ABORTING:
            live = [move for move in moves.values() if (move.status, move.how) == (MoveState.MOVING, LIVE)]
            await asyncio.gather(*(self._abort(move) for move in live))
        waiting = 0
        if drain.status is DrainStatus.RUNNING:
            for instance in await instances_of_host(self._store, drain.host):
                known = moves.get(instance.id)
                if known is not None and known.status in (MoveState.MOVING, MoveState.LEFT):
                    continue
                if moving < drain.concurrency and not await operations_waiting(self._store, instance.id):
                    moving += await self._begin(drain, instance, known)
                else:
                    waiting += 1
        if not moving and not waiting:
            log.info("drain.ended", host=drain.host, status=drain.status.value)
            await self._store.write(drain_end(drain))

    async def _begin(self, drain: Drain, instance: Instance, known: DrainMove | None) -> bool:
        """True: it moves now. Else it is left, or tried again by the next look."""
        how = _BY_STATE[drain.mode].get(instance.vm_state, "")
        attempts = known.attempts + 1 if known else 1
        move = DrainMove(drain.host, instance.id, how, MoveState.MOVING, attempts, known.reason if known else "", 0)
        if not how:
            await self._save(move, MoveState.LEFT, _cannot(drain.mode, instance))
            return False
        await self._save(move, MoveState.MOVING)  # before it is asked for: a crash in between is an attempt
        context = system_context(instance)
        try:
            if how == LIVE:
                await self._lifecycle.migrate_live(context, instance, LiveArguments())
            elif how == COLD:
                await self._lifecycle.migrate(context, instance)
            else:
                await self._lifecycle.shelve_offload(context, instance)
        except Conflict as refusal:  # something else was begun on it meanwhile: that first
            await self._save(msgspec.structs.replace(move, attempts=move.attempts - 1), MoveState.AGAIN, refusal.message)
        except InstarError as error:
            await self._failed(drain, move, error.message)
        return True

    async def _abort(self, move: DrainMove) -> None:
        """Its live migration ends with the guest where it is, unless it has come too far. Asked again with each look."""
        try:
            instance = await instance_fetch(self._store, move.instance_id)
            moves = await migrations_of_instance(self._store, instance.id)
            early = next((one.uuid for one in moves if one.status in (MoveStatus.QUEUED, MoveStatus.PREPARING)), None)
            await self._lifecycle.guests.abort_migration(instance, early=early)
        except InstarError as error:  # it has just ended, or its host does not answer now
            log.info("drain.not_aborted", instance=move.instance_id, reason=error.message)

    async def _settle(self, drain: Drain, move: DrainMove) -> DrainMove:
        """Whether one that moves has come to its end; a cold migration that it began is confirmed."""
        try:
            instance = await instance_fetch(self._store, move.instance_id)
        except NotFound:
            return await self._save(move, MoveState.MOVED, "deleted")
        if instance.terminated_at is not None:
            return await self._save(move, MoveState.MOVED, "deleted")
        if instance.task_state is not None or await operations_waiting(self._store, instance.id):
            return move
        pending = instance.facts.move
        if move.how == COLD and pending is not None and pending.source == move.host:
            try:
                await self._lifecycle.confirm_resize(system_context(instance), instance)
            except InstarError as refusal:  # a user was quicker, or reverts it
                log.info("drain.not_confirmed", instance=instance.id, reason=refusal.message)
            return move
        if instance.host != move.host:
            return await self._save(move, MoveState.MOVED)
        newest = (await operations_of_instance(self._store, instance.id))[:1]
        return await self._failed(drain, move, (newest[0].message or "") if newest else "")

    async def _failed(self, drain: Drain, move: DrainMove, reason: str) -> DrainMove:
        again = drain.status is DrainStatus.RUNNING and move.attempts < ATTEMPTS_MAX
        ended = MoveState.AGAIN if again else MoveState.LEFT
        return await self._save(move, ended, reason)

    async def _save(self, move: DrainMove, status: MoveState, reason: str = "") -> DrainMove:
        saved = msgspec.structs.replace(move, status=status, reason=reason)
        await self._store.write(drain_move_save(saved))
        return saved


def _cannot(mode: DrainMode, instance: Instance) -> str:
    if instance.vm_state is VmState.RESIZED:
        return "It waits for its resize or migration to be confirmed or reverted."
    also = [other.value for other, ways in _BY_STATE.items() if instance.vm_state in ways]
    if also:
        return f"It is {instance.vm_state.value}, which a drain moves only as: {', '.join(also)}; not as {mode.value}."
    return f"It cannot be moved while it is {instance.vm_state.value}."
