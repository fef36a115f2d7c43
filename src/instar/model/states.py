"""The states of an instance and its transition table, as data (LIFECYCLE.md sections 1 and 3; Compute API guide).

The API asks `check` before it accepts an action; the store sets `Transition.task`; the engine settles in `Transition.ends`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum

import msgspec

from instar.errors import WrongState


class VmState(StrEnum):
    BUILDING = "building"
    ACTIVE = "active"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    RESCUED = "rescued"
    RESIZED = "resized"
    SHELVED = "shelved"
    SHELVED_OFFLOADED = "shelved_offloaded"
    SOFT_DELETED = "soft-delete"
    DELETED = "deleted"
    ERROR = "error"


class TaskState(StrEnum):
    SCHEDULING = "scheduling"
    NETWORKING = "networking"
    BLOCK_DEVICE_MAPPING = "block_device_mapping"
    SPAWNING = "spawning"
    REBOOTING = "rebooting"
    REBOOT_PENDING = "reboot_pending"
    REBOOT_STARTED = "reboot_started"
    REBOOTING_HARD = "rebooting_hard"
    REBOOT_PENDING_HARD = "reboot_pending_hard"
    REBOOT_STARTED_HARD = "reboot_started_hard"
    POWERING_OFF = "powering-off"
    POWERING_ON = "powering-on"
    PAUSING = "pausing"
    UNPAUSING = "unpausing"
    SUSPENDING = "suspending"
    RESUMING = "resuming"
    RESIZE_PREP = "resize_prep"
    RESIZE_MIGRATING = "resize_migrating"
    RESIZE_MIGRATED = "resize_migrated"
    RESIZE_FINISH = "resize_finish"
    RESIZE_REVERTING = "resize_reverting"
    SHELVING = "shelving"
    SHELVING_IMAGE_PENDING_UPLOAD = "shelving_image_pending_upload"
    SHELVING_IMAGE_UPLOADING = "shelving_image_uploading"
    SHELVING_OFFLOADING = "shelving_offloading"
    UNSHELVING = "unshelving"
    IMAGE_SNAPSHOT = "image_snapshot"
    IMAGE_SNAPSHOT_PENDING = "image_snapshot_pending"
    IMAGE_PENDING_UPLOAD = "image_pending_upload"
    IMAGE_UPLOADING = "image_uploading"
    IMAGE_BACKUP = "image_backup"
    REBUILDING = "rebuilding"
    REBUILD_BLOCK_DEVICE_MAPPING = "rebuild_block_device_mapping"
    REBUILD_SPAWNING = "rebuild_spawning"
    RESCUING = "rescuing"
    UNRESCUING = "unrescuing"
    MIGRATING = "migrating"
    UPDATING_PASSWORD = "updating_password"  # noqa: S105 - a state, not a password
    DELETING = "deleting"
    SOFT_DELETING = "soft-deleting"
    RESTORING = "restoring"


class PowerState(IntEnum):
    """What the hypervisor says; the numbers are the Compute API's."""

    NOSTATE = 0
    RUNNING = 1
    PAUSED = 3
    SHUTDOWN = 4
    CRASHED = 6
    SUSPENDED = 7


class Action(StrEnum):
    """An operation, by the name it has in `os-instance-actions`."""

    CREATE = "create"
    DELETE = "delete"
    REBOOT = "reboot"
    START = "start"
    STOP = "stop"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    SUSPEND = "suspend"
    RESUME = "resume"
    CREATE_IMAGE = "createImage"
    CREATE_BACKUP = "createBackup"
    SHELVE = "shelve"
    SHELVE_OFFLOAD = "shelveOffload"
    UNSHELVE = "unshelve"
    RESIZE = "resize"
    MIGRATE = "migrate"
    CONFIRM_RESIZE = "confirmResize"
    REVERT_RESIZE = "revertResize"
    REBUILD = "rebuild"
    RESCUE = "rescue"
    UNRESCUE = "unrescue"
    LIVE_MIGRATE = "live-migration"
    FIND_GUEST = "find-guest"
    EVACUATE = "evacuate"
    CHANGE_PASSWORD = "changePassword"  # noqa: S105 - an action, not a password
    SOFT_DELETE = "softDelete"
    RESTORE = "restore"
    ATTACH_VOLUME = "attach_volume"
    DETACH_VOLUME = "detach_volume"
    SWAP_VOLUME = "swap_volume"
    ATTACH_INTERFACE = "attach_interface"
    DETACH_INTERFACE = "detach_interface"
    LOCK = "lock"
    UNLOCK = "unlock"
    RESET_STATE = "resetState"


class Transition(msgspec.Struct, frozen=True):
    """When an action is allowed and where it goes. `ends` and `fails` are None where it ends as it began. `anywhere`: also
    while it is not known on which of two hosts the guest is."""

    vm_states: frozenset[VmState]
    task: TaskState | None
    ends: VmState | None = None
    task_states: frozenset[TaskState | None] = frozenset({None})
    fails: VmState | None = None
    anywhere: bool = False


_ANY_VM = frozenset(VmState) - {VmState.DELETED}
_ANY_TASK: frozenset[TaskState | None] = frozenset(TaskState) | {None}
_S, _T = VmState, TaskState


def _states(*states: VmState) -> frozenset[VmState]:
    return frozenset(states)


_WITH_DISK = _states(_S.ACTIVE, _S.STOPPED, _S.PAUSED, _S.SUSPENDED)

# A soft reboot and a hard one are one action in the record; their rules differ, so each has its row.
REBOOT_SOFT, REBOOT_HARD = "reboot SOFT", "reboot HARD"

TRANSITIONS: Mapping[str, Transition] = {
    Action.CREATE: Transition(frozenset(), _T.SCHEDULING, ends=_S.ACTIVE, fails=_S.ERROR),
    Action.DELETE: Transition(
        _ANY_VM, _T.DELETING, ends=_S.DELETED, task_states=_ANY_TASK, fails=_S.ERROR, anywhere=True
    ),
    REBOOT_SOFT: Transition(_states(_S.ACTIVE), _T.REBOOTING, ends=_S.ACTIVE),
    REBOOT_HARD: Transition(
        _states(_S.ACTIVE, _S.STOPPED, _S.PAUSED, _S.SUSPENDED, _S.ERROR, _S.RESCUED),
        _T.REBOOTING_HARD,
        ends=_S.ACTIVE,  # rescued stays rescued
        task_states=frozenset(
            {
                None, _T.REBOOTING, _T.REBOOT_PENDING, _T.REBOOT_STARTED, _T.REBOOTING_HARD, _T.REBOOT_PENDING_HARD,
                _T.REBOOT_STARTED_HARD, _T.PAUSING, _T.UNPAUSING, _T.SUSPENDING, _T.RESUMING,
            }
        ),
    ),
    Action.START: Transition(_states(_S.STOPPED), _T.POWERING_ON, ends=_S.ACTIVE),
    Action.STOP: Transition(_states(_S.ACTIVE, _S.ERROR), _T.POWERING_OFF, ends=_S.STOPPED),
    Action.PAUSE: Transition(_states(_S.ACTIVE), _T.PAUSING, ends=_S.PAUSED),
    Action.UNPAUSE: Transition(_states(_S.PAUSED), _T.UNPAUSING, ends=_S.ACTIVE),
    Action.SUSPEND: Transition(_states(_S.ACTIVE), _T.SUSPENDING, ends=_S.SUSPENDED),
    Action.RESUME: Transition(_states(_S.SUSPENDED), _T.RESUMING, ends=_S.ACTIVE),
    Action.CREATE_IMAGE: Transition(_WITH_DISK, _T.IMAGE_SNAPSHOT),
    Action.CREATE_BACKUP: Transition(_WITH_DISK, _T.IMAGE_BACKUP),
    Action.SHELVE: Transition(_WITH_DISK, _T.SHELVING, ends=_S.SHELVED),
    Action.SHELVE_OFFLOAD: Transition(_states(_S.SHELVED), _T.SHELVING_OFFLOADING, ends=_S.SHELVED_OFFLOADED),
    Action.UNSHELVE: Transition(_states(_S.SHELVED, _S.SHELVED_OFFLOADED), _T.UNSHELVING, ends=_S.ACTIVE),
    Action.RESIZE: Transition(_states(_S.ACTIVE, _S.STOPPED), _T.RESIZE_PREP, ends=_S.RESIZED),
    Action.MIGRATE: Transition(_states(_S.ACTIVE, _S.STOPPED), _T.RESIZE_PREP, ends=_S.RESIZED),
    # Ends active, or stopped where it was stopped before the resize.
    Action.CONFIRM_RESIZE: Transition(_states(_S.RESIZED), None, ends=_S.ACTIVE),
    Action.REVERT_RESIZE: Transition(_states(_S.RESIZED), _T.RESIZE_REVERTING, ends=_S.ACTIVE),
    # A rebuilt instance that was stopped stays stopped.
    Action.REBUILD: Transition(_states(_S.ACTIVE, _S.STOPPED, _S.ERROR), _T.REBUILDING, ends=_S.ACTIVE),
    Action.RESCUE: Transition(_states(_S.ACTIVE, _S.STOPPED, _S.ERROR), _T.RESCUING, ends=_S.RESCUED),
    Action.UNRESCUE: Transition(_states(_S.RESCUED), _T.UNRESCUING, ends=_S.ACTIVE),
    Action.LIVE_MIGRATE: Transition(_states(_S.ACTIVE, _S.PAUSED), _T.MIGRATING),
    # What the cloud does by itself after a live migration of which nobody saw the end.
    Action.FIND_GUEST: Transition(_ANY_VM, _T.MIGRATING, anywhere=True),
    Action.EVACUATE: Transition(_states(_S.ACTIVE, _S.STOPPED, _S.ERROR), _T.REBUILDING, anywhere=True),
    Action.CHANGE_PASSWORD: Transition(_states(_S.ACTIVE), _T.UPDATING_PASSWORD, ends=_S.ACTIVE),
    Action.SOFT_DELETE: Transition(
        _ANY_VM - {_S.SOFT_DELETED}, _T.SOFT_DELETING, ends=_S.SOFT_DELETED, task_states=_ANY_TASK, fails=_S.ERROR,
        anywhere=True,
    ),
    Action.RESTORE: Transition(_states(_S.SOFT_DELETED), _T.RESTORING, ends=_S.ACTIVE),
    # Without a task_state: they wait for their turn, and what comes after them waits for them.
    Action.ATTACH_VOLUME: Transition(
        _states(_S.ACTIVE, _S.PAUSED, _S.STOPPED, _S.RESIZED, _S.SOFT_DELETED, _S.SHELVED, _S.SHELVED_OFFLOADED), None
    ),
    Action.DETACH_VOLUME: Transition(
        _states(_S.ACTIVE, _S.PAUSED, _S.STOPPED, _S.RESIZED, _S.SOFT_DELETED, _S.SHELVED, _S.SHELVED_OFFLOADED), None
    ),
    Action.SWAP_VOLUME: Transition(_states(_S.ACTIVE, _S.PAUSED, _S.RESIZED), None),
    Action.ATTACH_INTERFACE: Transition(_states(_S.ACTIVE, _S.PAUSED, _S.STOPPED), None),
    Action.DETACH_INTERFACE: Transition(_states(_S.ACTIVE, _S.PAUSED, _S.STOPPED), None),
    Action.LOCK: Transition(_ANY_VM, None, task_states=_ANY_TASK),
    Action.UNLOCK: Transition(_ANY_VM, None, task_states=_ANY_TASK),
    Action.RESET_STATE: Transition(_ANY_VM, None, task_states=_ANY_TASK),
}


def check(rule: str, instance_id: str, vm_state: VmState, task_state: TaskState | None) -> Transition:
    """The transition of `rule` (a key of TRANSITIONS). Raises WrongState with the Compute API's sentence."""
    transition = TRANSITIONS[rule]
    action = rule.split()[0]
    if vm_state not in transition.vm_states:
        raise WrongState(action=action, id=instance_id, attribute="vm_state", state=vm_state.value)
    if task_state not in transition.task_states:
        state = task_state.value if task_state else "None"
        raise WrongState(action=action, id=instance_id, attribute="task_state", state=state)
    return transition


_BY_TASK: Mapping[VmState, Mapping[TaskState, str]] = {
    _S.ACTIVE: {
        _T.REBOOTING: "REBOOT", _T.REBOOT_PENDING: "REBOOT", _T.REBOOT_STARTED: "REBOOT",
        _T.REBOOTING_HARD: "HARD_REBOOT", _T.REBOOT_PENDING_HARD: "HARD_REBOOT",
        _T.REBOOT_STARTED_HARD: "HARD_REBOOT",
        _T.REBUILDING: "REBUILD", _T.REBUILD_BLOCK_DEVICE_MAPPING: "REBUILD", _T.REBUILD_SPAWNING: "REBUILD",
        _T.RESIZE_PREP: "RESIZE", _T.RESIZE_MIGRATING: "RESIZE", _T.RESIZE_MIGRATED: "RESIZE",
        _T.RESIZE_FINISH: "RESIZE", _T.MIGRATING: "MIGRATING", _T.UPDATING_PASSWORD: "PASSWORD",
    },
    _S.STOPPED: {
        _T.RESIZE_PREP: "RESIZE", _T.RESIZE_MIGRATING: "RESIZE", _T.RESIZE_MIGRATED: "RESIZE",
        _T.RESIZE_FINISH: "RESIZE", _T.REBUILDING: "REBUILD", _T.REBUILD_BLOCK_DEVICE_MAPPING: "REBUILD",
        _T.REBUILD_SPAWNING: "REBUILD",
    },
    _S.RESIZED: {_T.RESIZE_REVERTING: "REVERT_RESIZE"},
    _S.ERROR: {
        _T.REBUILDING: "REBUILD", _T.REBUILD_BLOCK_DEVICE_MAPPING: "REBUILD", _T.REBUILD_SPAWNING: "REBUILD",
    },
}

_BY_VM_STATE: Mapping[VmState, str] = {
    _S.BUILDING: "BUILD", _S.ACTIVE: "ACTIVE", _S.PAUSED: "PAUSED", _S.SUSPENDED: "SUSPENDED", _S.STOPPED: "SHUTOFF",
    _S.RESCUED: "RESCUE", _S.RESIZED: "VERIFY_RESIZE", _S.SHELVED: "SHELVED",
    _S.SHELVED_OFFLOADED: "SHELVED_OFFLOADED", _S.SOFT_DELETED: "SOFT_DELETED", _S.DELETED: "DELETED",
    _S.ERROR: "ERROR",
}


def status_of(vm_state: VmState, task_state: TaskState | None) -> str:
    """The API's `status`: a pure function of (vm_state, task_state)."""
    if task_state is not None:
        by_task = _BY_TASK.get(vm_state, {})
        if task_state in by_task:
            return by_task[task_state]
    return _BY_VM_STATE[vm_state]


def states_of_status(status: str) -> list[tuple[VmState, TaskState | None]]:
    """Every (vm_state, task_state) that shows as `status`; task None means any task without a status of its own.

    Used to filter a list by status in SQL. An unknown status gives an empty list (the list is then empty)."""
    found: list[tuple[VmState, TaskState | None]] = [
        (vm_state, None) for vm_state, name in _BY_VM_STATE.items() if name == status
    ]
    for vm_state, by_task in _BY_TASK.items():
        found += [(vm_state, task) for task, name in by_task.items() if name == status]
    return found
