"""Starting a guest on a host, the same in every operation: its ports first, then the guest, which has to run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from instar.engine.run import Run
from instar.errors import HypervisorError
from instar.model.guest import GuestDefinition
from instar.model.network import PortDefinition
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
    await set_up_ports(run, host, guest.ports, undo=undo_ports, task=task)
    return await start_on_ports(run, host, guest, undo=undo, task=task, step=step)


async def set_up_ports(
    run: Run, host: str, ports: tuple[PortDefinition, ...], *, undo: Undo | None, task: TaskState | None = None
) -> None:
    """The first of the two, for who has something to do or to wait for in between."""
    if ports:
        await run.step("set up ports", run.hosts.ensure_ports, host, ports, undo=undo, task=task)


async def start_on_ports(
    run: Run,
    host: str,
    guest: GuestDefinition,
    *,
    undo: Undo | None,
    task: TaskState | None = None,
    step: str = "start guest",
) -> PowerState:
    """The second: the guest's ports are set up. Raises HypervisorError when it does not run."""
    state = await run.step(step, run.hosts.ensure_running, host, guest, undo=undo, task=task)
    if state.power_state is not PowerState.RUNNING:
        raise HypervisorError(reason="the guest is not running")
    return state.power_state
