"""What is due by time: shelved instances leave their hosts, moves are confirmed, deleted instances go for good.

Looks at the record again and again, so that nothing is lost with a process; each wish goes through the same door as a
user's, and is refused where an operation is in flight. Runs beside a conductor.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable

import structlog

from instar.clock import MICROS_PER_S, iso, now_us
from instar.errors import Conflict, InstarError
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.door import Lifecycle
from instar.lifecycle.repeated import Repeated
from instar.lifecycle.soft_delete import SINCE
from instar.model.context import RequestContext
from instar.model.instance import SHELVED_AT, Instance
from instar.model.states import VmState
from instar.store.instances import instances_in_state

log = structlog.get_logger()

READ_AT_ONCE = 200  # instances of a state; all of them are looked at, for those that are never due must not hide others


class Timers(Repeated):
    def __init__(self, cloud: Cloud, lifecycle: Lifecycle) -> None:
        self._cloud, self._lifecycle = cloud, lifecycle
        self._settings = cloud.settings.lifecycle
        super().__init__("timers", self.look, every_s=self._settings.timers_s)

    async def look(self) -> None:
        """Ask for everything that is due now."""
        settings = self._settings
        if settings.shelved_offload_s > 0:
            await self._each(VmState.SHELVED, self._offload)
        await self._each(VmState.RESIZED, self._confirm)
        if settings.reclaim_instance_interval_s > 0:
            await self._each(VmState.SOFT_DELETED, self._reclaim)

    async def _each(self, state: VmState, due: Callable[[Instance], Awaitable[None]]) -> None:
        after: str | None = ""
        while after is not None:
            some = await instances_in_state(self._cloud.store, state, after=after, limit=READ_AT_ONCE)
            after = some[-1].id if len(some) == READ_AT_ONCE else None
            for instance in some:
                try:
                    await due(instance)
                except Conflict as refusal:
                    log.debug("timers.refused", instance=instance.id, reason=refusal.message)
                except InstarError as error:
                    log.warning("timers.not_done", instance=instance.id, reason=error.message)

    async def _offload(self, instance: Instance) -> None:
        due = iso(now_us() - round(self._settings.shelved_offload_s * MICROS_PER_S))
        if instance.facts.system_metadata.get(SHELVED_AT, "") <= due:
            await self._lifecycle.shelve_offload(system_context(instance), instance)

    async def _confirm(self, instance: Instance) -> None:
        move = instance.facts.move
        if move is not None and not move.reverting and move.ends_at is not None and now_us() >= move.ends_at:
            await self._lifecycle.confirm_resize(system_context(instance), instance)

    async def _reclaim(self, instance: Instance) -> None:
        since = int(instance.facts.system_metadata.get(SINCE, "0"))
        if now_us() - since >= self._settings.reclaim_instance_interval_s * MICROS_PER_S:
            await self._lifecycle.delete(system_context(instance), instance, force=True)


def system_context(instance: Instance) -> RequestContext:
    """What the cloud itself does for an instance, in its project's name."""
    return RequestContext(
        request_id=f"req-{uuid.uuid4()}", user_id=instance.user_id, user_name="", project_id=instance.project_id,
        project_name="", roles=frozenset({"admin"}),
    )  # fmt: skip
