"""Starting a guest on a host, the same in every operation: its ports first, then the guest, which has to run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from instar.engine.run import Run
from instar.errors import HypervisorError
from instar.model.guest import GuestDefinition
from instar.model.states import PowerState, TaskState

Undo = Callable[..., Awaitable[object]]


async def start_guest(
    run: Run,
    host: str,
    guest: GuestDefinition,
    *,
    undo: Undo | None,
    undo_ports: Undo | None = None,
    task: TaskState | None = None,
    step: str = "start guest",
) -> PowerState:
    """Two steps, or one for a guest without ports. `undo` is that of the guest's start; `undo_ports`, where the ports were
    not on this host before, that of theirs. Raises HypervisorError when the guest does not run."""
    if guest.ports:
        await run.step("set up ports", run.hosts.ensure_ports, host, guest.ports, undo=undo_ports, task=task)
    state = await run.step(step, run.hosts.ensure_running, host, guest, undo=undo, task=task)
    if state.power_state is not PowerState.RUNNING:
        raise HypervisorError(reason="the guest is not running")
    return state.power_state
