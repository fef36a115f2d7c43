"""Actions on a running or sleeping guest: reboot, start, stop, pause, suspend; locks; soft-deleted servers; resetState."""

from __future__ import annotations

from msgspec import UNSET

from instar.api.resource import Compute
from instar.api.servers.action import Action, plain
from instar.api.servers.bodies import Lock, Reboot, ResetState
from instar.http.answer import Answer, empty_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.model.instance import Instance
from instar.model.states import VmState


class PowerActions:
    def __init__(self, compute: Compute) -> None:
        self._lifecycle = compute.lifecycle

    def rows(self) -> tuple[Action, ...]:
        door, name = self._lifecycle, "os_compute_api:"
        return (
            Action("reboot", name + "servers:reboot", self._reboot, ((1, Reboot),)),
            plain("os-start", "servers:start", door.start),
            plain("os-stop", "servers:stop", door.stop),
            plain("pause", "os-pause-server:pause", door.pause),
            plain("unpause", "os-pause-server:unpause", door.unpause),
            plain("suspend", "os-suspend-server:suspend", door.suspend),
            plain("resume", "os-suspend-server:resume", door.resume),
            Action("lock", name + "os-lock-server:lock", self._lock, ((1, None), (73, Lock)), or_null=True),
            plain("unlock", "os-lock-server:unlock", door.unlock),
            plain("forceDelete", "os-deferred-delete:force", self._force_delete),
            plain("restore", "os-deferred-delete:restore", door.restore),
            Action("os-resetState", name + "os-admin-actions:reset_state", self._reset_state, ((1, ResetState),)),
        )

    async def _reboot(self, request: Request, instance: Instance, body: Reboot) -> Answer:
        await self._lifecycle.reboot(request.context, instance, hard=body.type.upper() == "HARD")
        return empty_answer(202)

    async def _lock(self, request: Request, instance: Instance, body: Lock | None) -> Answer:
        reason = body.locked_reason if body is not None and body.locked_reason is not UNSET else None
        await self._lifecycle.lock(request.context, instance, reason)
        return empty_answer(202)

    async def _force_delete(self, context: RequestContext, instance: Instance) -> None:
        await self._lifecycle.delete(context, instance, force=True)

    async def _reset_state(self, request: Request, instance: Instance, body: ResetState) -> Answer:
        await self._lifecycle.reset_state(request.context, instance, VmState(body.state))
        return empty_answer(202)
