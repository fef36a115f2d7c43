"""Which function runs which action. A new operation is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from instar.engine.run import Run
from instar.lifecycle import attach_interface, attach_volume
from instar.lifecycle.build import build
from instar.lifecycle.build_volumes import took_volumes
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.delete import delete
from instar.lifecycle.evacuate import evacuate
from instar.lifecycle.find_guest import find
from instar.lifecycle.live_migration import migrate_live
from instar.lifecycle.move import confirm, move, revert, took_quota
from instar.lifecycle.password import change_password
from instar.lifecycle.pause import pause, unpause
from instar.lifecycle.power import start, stop
from instar.lifecycle.reboot import reboot
from instar.lifecycle.rebuild import rebuild
from instar.lifecycle.rescue import rescue, unrescue
from instar.lifecycle.shelve import shelve, shelve_offload, unshelve
from instar.lifecycle.snapshot import create_image
from instar.lifecycle.soft_delete import restore, soft_delete
from instar.lifecycle.suspend import resume, suspend
from instar.model.states import Action

_FUNCTIONS: dict[str, Callable[[Run, Cloud], Awaitable[None]]] = {
    Action.CREATE: build,
    Action.DELETE: delete,
    Action.REBOOT: reboot,
    Action.START: start,
    Action.STOP: stop,
    Action.PAUSE: pause,
    Action.UNPAUSE: unpause,
    Action.SUSPEND: suspend,
    Action.RESUME: resume,
    Action.CREATE_IMAGE: create_image,
    Action.CREATE_BACKUP: create_image,
    Action.SHELVE: shelve,
    Action.SHELVE_OFFLOAD: shelve_offload,
    Action.UNSHELVE: unshelve,
    Action.RESIZE: move,
    Action.MIGRATE: move,
    Action.CONFIRM_RESIZE: confirm,
    Action.REVERT_RESIZE: revert,
    Action.REBUILD: rebuild,
    Action.RESCUE: rescue,
    Action.UNRESCUE: unrescue,
    Action.LIVE_MIGRATE: migrate_live,
    Action.FIND_GUEST: find,
    Action.EVACUATE: evacuate,
    Action.CHANGE_PASSWORD: change_password,
    Action.SOFT_DELETE: soft_delete,
    Action.RESTORE: restore,
    Action.ATTACH_VOLUME: attach_volume.attach,
    Action.DETACH_VOLUME: attach_volume.detach,
    Action.SWAP_VOLUME: attach_volume.swap,
    Action.ATTACH_INTERFACE: attach_interface.attach,
    Action.DETACH_INTERFACE: attach_interface.detach,
}

# Actions for which something is taken before they are recorded.
_TAKEN: dict[str, Callable[[Cloud, Run], None]] = {
    Action.CREATE: took_volumes,
    Action.ATTACH_VOLUME: attach_volume.took_volume,
    Action.SWAP_VOLUME: attach_volume.took_new_volume,
    Action.ATTACH_INTERFACE: attach_interface.took_port,
    Action.RESIZE: took_quota,
}


def taken(cloud: Cloud) -> dict[str, Callable[[Run], None]]:
    """What tells a run of what was taken for it when it was accepted, for a conductor."""
    return {action: partial(took, cloud) for action, took in _TAKEN.items()}


def operations(cloud: Cloud) -> dict[str, Callable[[Run], Awaitable[None]]]:
    """The lifecycle function of each action, for a conductor."""
    return {action: partial(_call, function, cloud) for action, function in _FUNCTIONS.items()}


async def _call(function: Callable[[Run, Cloud], Awaitable[None]], cloud: Cloud, run: Run) -> None:
    await function(run, cloud)
