"""The walk: which operations in which order. What each does and checks is in the chapters.

The order is such that few boots show much: a guest that is stopped is resized, reverted and migrated before it boots again.
"""

from __future__ import annotations

from collections.abc import Callable

from instar.cli.demo import disks, ending, moves, power, trouble
from instar.cli.demo.stage import Stage

Steps = tuple[tuple[str, Callable[[Stage], str]], ...]

ONE_HOST: Steps = (
    ("create", power.create),
    ("soft reboot", power.soft_reboot),
    ("hard reboot", trouble.hard_reboot),
    ("stop", power.stop),
    ("start", power.start),
    ("console log", power.console_log),
    ("server events", ending.events),
    ("delete", ending.delete),
    ("audit", ending.audit),
)

WHOLE_LIFE: Steps = (
    ("create", power.create),
    ("write a file", power.write),
    ("soft reboot", power.soft_reboot),
    ("pause", power.pause),
    ("unpause", power.unpause),
    ("suspend", power.suspend),
    ("resume", power.resume),
    ("change password", power.change_password),
    ("create image", disks.create_image),
    ("attach volume", disks.attach_volume),
    ("detach volume", disks.detach_volume),
    ("attach interface", disks.attach_interface),
    ("detach interface", disks.detach_interface),
    ("resize", moves.resize),
    ("confirm resize", moves.confirm_resize),
    ("stop", power.stop),
    ("resize, stopped", moves.resize_stopped),
    ("revert resize", moves.revert_resize),
    ("migrate", moves.migrate),
    ("confirm migration", moves.confirm_migration),
    ("start", power.start_with_data),
    ("attach volume there", disks.attach_volume_again),
    ("live migration", moves.live_migrate),
    ("shelve and offload", moves.shelve),
    ("unshelve elsewhere", moves.unshelve),
    ("rescue", trouble.rescue),
    ("unrescue", trouble.unrescue),
    ("rebuild", trouble.rebuild),
    ("hard reboot", trouble.hard_reboot),
    ("lock, unlock", power.lock),
    ("(host lost)", trouble.lose_host),
    ("evacuate", trouble.evacuate),
    ("start", trouble.start_evacuated),
    ("(host returns)", trouble.host_returns),
    ("console log", power.console_log),
    ("server events", ending.events),
    ("delete", ending.delete),
    ("audit", ending.audit),
)


def walk(stage: Stage) -> None:
    """The first operation that fails ends the walk: what follows would only repeat it."""
    steps = WHOLE_LIFE if stage.places.several else ONE_HOST
    for name, step in steps:
        if not stage.play(name, step):
            return
