"""Which function runs which action. A new operation is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from instar.engine.run import Run
from instar.lifecycle.build import build
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.delete import delete
from instar.lifecycle.power import start, stop
from instar.lifecycle.reboot import reboot
from instar.model.states import Action

_FUNCTIONS: dict[str, Callable[[Run, Cloud], Awaitable[None]]] = {
    Action.CREATE: build,
    Action.DELETE: delete,
    Action.REBOOT: reboot,
    Action.START: start,
    Action.STOP: stop,
}


def operations(cloud: Cloud) -> dict[str, Callable[[Run], Awaitable[None]]]:
    """The lifecycle function of each action, for a conductor."""
    return {action: partial(_call, function, cloud) for action, function in _FUNCTIONS.items()}


async def _call(function: Callable[[Run, Cloud], Awaitable[None]], cloud: Cloud, run: Run) -> None:
    await function(run, cloud)
