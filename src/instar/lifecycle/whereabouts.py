"""Which of two hosts has the guest, after a live migration of which nobody saw the end (decision 0019).

Asked by the migration itself, and by the operation `find_guest.py` when its hosts fell silent before they could answer.
"""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum

import structlog

from instar.engine.run import Run
from instar.errors import InstarError, LeaseLost, StaleEpoch, Unavailable
from instar.model.guest import GuestState
from instar.model.states import PowerState

log = structlog.get_logger()

ASK_AGAIN_S = 0.5


class Side(StrEnum):
    SOURCE = "source"
    DEST = "destination"


def runs(state: GuestState | None) -> bool:
    """It has a process, whose processors run or stand still. None, what an unheard host says: not as far as is known."""
    if state is None or state.domain_id is None:
        return False
    return state.power_state in (PowerState.RUNNING, PowerState.PAUSED)


def side_of(source: GuestState | None, dest: GuestState | None, *, was_paused: bool) -> Side | None:
    """Where the guest is, by what each host says of it (None: nothing). None: it could be on either, and must be started on
    neither. `was_paused`: before the migration.

    A host says so only when no migration of the guest is going on there. The source alone is believed when the guest's
    processors run there; a guest that stands still, is off or is gone there may have moved. The destination is believed
    when it has the guest: it does not count one as its own that has not come yet."""
    if source is not None and source.domain_id is not None and source.power_state is PowerState.RUNNING:
        return Side.SOURCE
    if runs(dest):
        return Side.DEST
    if runs(source) and (was_paused or _has_none(dest)):
        return Side.SOURCE
    if source is None or dest is None:
        return None
    if _has_none(dest):
        return Side.SOURCE
    # It is defined there only once it has come; before that it exists without any state.
    return Side.DEST if dest.power_state is not PowerState.NOSTATE else None


def _has_none(state: GuestState | None) -> bool:
    return state is not None and not state.exists


async def find_guest(source: str, dest: str, run: Run, patience_s: float, given_up: tuple[str, ...] = ()) -> str:
    """The host that has the guest; empty where that cannot be told, after a host has not answered for `patience_s`. Hosts
    that were `given_up` are not asked: they have nothing.

    To be asked under the operation's epoch: whatever an older one still does with the guest ends before a host answers."""
    was_paused = run.instance.power_state is PowerState.PAUSED
    until = time.monotonic() + patience_s
    while True:
        states = await asyncio.gather(*(_observed(run, host, host in given_up) for host in (source, dest)))
        side = side_of(*states, was_paused=was_paused)
        if side is not None:
            return source if side is Side.SOURCE else dest
        if time.monotonic() > until:
            return ""
        await asyncio.sleep(ASK_AGAIN_S)


async def _observed(run: Run, host: str, given_up: bool) -> GuestState | None:
    if given_up:
        return GuestState(exists=False)
    try:
        return await run.hosts.observe(host)
    except (LeaseLost, StaleEpoch, Unavailable):
        raise
    except InstarError as error:
        log.info("live_migration.host_away", host=host, reason=error.message)
        return None
