"""What goes straight to the host of a guest: questions, and a word to a live migration in flight. The API calls it.

There is no operation of these calls, and a lock does not stand in their way. All that is recorded of them is that a live
migration which has not begun is not to begin.
"""

from __future__ import annotations

import structlog

from instar.engine.hosts import HostClient
from instar.errors import GuestAgentMissing, OperationError, WrongState
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import host_of
from instar.model.guest import GuestDiagnostics
from instar.model.instance import Instance
from instar.model.states import TaskState, VmState
from instar.store.contract import WriteConflict
from instar.store.moves import migration_abort_early

log = structlog.get_logger()

ANSWER_DEADLINE_S = 15.0
RUNNING_STATES = frozenset({VmState.ACTIVE, VmState.PAUSED, VmState.RESCUED, VmState.RESIZED})


class GuestCalls:
    """Each call raises Conflict for an instance that is on no host, HostUnreachable."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def abort_migration(self, instance: Instance, *, early: str | None = None) -> None:
        """A live migration in flight ends with the guest where it was. Raises WrongState where none is.

        `early`: the uuid of one that is still queued or prepared. It ends when the step at hand has."""
        _while_migrating(instance, "abort live migration")
        if early is not None:
            try:
                await self._cloud.store.write(migration_abort_early(early))
                return
            except WriteConflict:
                log.info("live_migration.runs_already", instance=instance.id)
        await self._client(instance).abort_live(host_of(instance))

    async def force_migration(self, instance: Instance) -> None:
        """A live migration in flight is finished soon, at the cost of a longer pause. Raises WrongState where none is."""
        _while_migrating(instance, "force_complete")
        await self._client(instance).force_live(host_of(instance))

    async def require_agent(self, instance: Instance, what: str) -> None:
        """Raises GuestAgentMissing where the guest runs no agent that could do `what`. A host that gives no answer is no
        reason to refuse: the operation will find out."""
        try:
            has_agent = await self._client(instance).has_guest_agent(host_of(instance))
        except OperationError:
            return
        if not has_agent:
            raise GuestAgentMissing(id=instance.id, what=what)

    async def diagnostics(self, instance: Instance) -> GuestDiagnostics:
        """What the hypervisor counts of the guest. Raises WrongState for one that does not run."""
        if instance.vm_state not in RUNNING_STATES:
            raise WrongState(
                action="get_diagnostics", id=instance.id, attribute="vm_state", state=instance.vm_state.value
            )
        return await self._client(instance).diagnostics(host_of(instance))

    async def console_output(self, instance: Instance, length_bytes: int | None) -> str:
        """The end of the serial console's log. Raises Conflict where the instance is on no host, HostUnreachable."""
        bound = self._cloud.settings.lifecycle.console_length_max_bytes
        wanted = bound if length_bytes is None or length_bytes < 0 else min(length_bytes, bound)
        output = await self._client(instance).console_output(host_of(instance), wanted)
        return output.decode("utf-8", errors="replace")

    def _client(self, instance: Instance) -> HostClient:
        return HostClient(self._cloud.bus, instance_id=instance.id, deadline_s=ANSWER_DEADLINE_S)


def _while_migrating(instance: Instance, action: str) -> None:
    if instance.task_state is not TaskState.MIGRATING:
        state = instance.task_state.value if instance.task_state else "None"
        raise WrongState(action=action, id=instance.id, attribute="task_state", state=state)
