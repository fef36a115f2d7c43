"""The states of an instance: every row of LIFECYCLE sections 1 and 3, written down a second time."""

from __future__ import annotations

import itertools

import pytest

from instar.errors import WrongState
from instar.model.states import (
    REBOOT_HARD,
    REBOOT_SOFT,
    TRANSITIONS,
    Action,
    PowerState,
    TaskState,
    VmState,
    check,
    states_of_status,
    status_of,
)

PLAIN = {
    "building": "BUILD", "active": "ACTIVE", "paused": "PAUSED", "suspended": "SUSPENDED", "stopped": "SHUTOFF",
    "rescued": "RESCUE", "resized": "VERIFY_RESIZE", "shelved": "SHELVED", "shelved_offloaded": "SHELVED_OFFLOADED",
    "soft-delete": "SOFT_DELETED", "deleted": "DELETED", "error": "ERROR",
}  # fmt: skip
RESIZE = dict.fromkeys(("resize_prep", "resize_migrating", "resize_migrated", "resize_finish"), "RESIZE")
REBUILD = dict.fromkeys(("rebuilding", "rebuild_block_device_mapping", "rebuild_spawning"), "REBUILD")
SPECIAL = {
    "active": {
        "rebooting": "REBOOT", "reboot_pending": "REBOOT", "reboot_started": "REBOOT", "rebooting_hard": "HARD_REBOOT",
        "reboot_pending_hard": "HARD_REBOOT", "reboot_started_hard": "HARD_REBOOT", "migrating": "MIGRATING",
        "updating_password": "PASSWORD", **RESIZE, **REBUILD,
    },
    "stopped": {**RESIZE, **REBUILD},
    "resized": {"resize_reverting": "REVERT_RESIZE"},
    "error": REBUILD,
}  # fmt: skip
TASKS = """scheduling networking block_device_mapping spawning rebooting reboot_pending reboot_started rebooting_hard
    reboot_pending_hard reboot_started_hard powering-off powering-on pausing unpausing suspending resuming resize_prep
    resize_migrating resize_migrated resize_finish resize_reverting shelving shelving_image_pending_upload
    shelving_image_uploading shelving_offloading unshelving image_snapshot image_snapshot_pending image_pending_upload
    image_uploading image_backup rebuilding rebuild_block_device_mapping rebuild_spawning rescuing unrescuing migrating
    updating_password deleting soft-deleting restoring"""


def test_the_names_are_those_of_the_contract() -> None:
    assert sorted(state.value for state in VmState) == sorted(PLAIN)
    assert sorted(task.value for task in TaskState) == sorted(TASKS.split())
    numbers = {"NOSTATE": 0, "RUNNING": 1, "PAUSED": 3, "SHUTDOWN": 4, "CRASHED": 6, "SUSPENDED": 7}
    assert {power.name: power.value for power in PowerState} == numbers


@pytest.mark.parametrize("vm_state", VmState)
def test_status_is_a_function_of_vm_state_and_task_state_alone(vm_state: VmState) -> None:
    assert status_of(vm_state, None) == PLAIN[vm_state.value]
    for task in TaskState:
        expected = SPECIAL.get(vm_state.value, {}).get(task.value, PLAIN[vm_state.value])
        assert status_of(vm_state, task) == expected, task


def test_states_of_a_status_are_the_ones_that_show_as_it() -> None:
    for status in {status_of(vm, task) for vm, task in itertools.product(VmState, [None, *TaskState])}:
        found = states_of_status(status)
        for vm_state, task in itertools.product(VmState, TaskState):
            own = status_of(vm_state, task) != status_of(vm_state, None)
            shows = (vm_state, task) in found if own else (vm_state, None) in found
            assert shows is (status_of(vm_state, task) == status), (vm_state, task, status)
    assert states_of_status("NO_SUCH_STATUS") == []


# LIFECYCLE section 3: action → (from, first task_state, end state). Task null unless said.
TABLE: dict[str, tuple[str, str | None, str | None]] = {
    Action.START: ("stopped", "powering-on", "active"),
    Action.STOP: ("active error", "powering-off", "stopped"),
    REBOOT_SOFT: ("active", "rebooting", "active"),
    REBOOT_HARD: ("active stopped paused suspended error rescued", "rebooting_hard", "active"),
    Action.PAUSE: ("active", "pausing", "paused"),
    Action.UNPAUSE: ("paused", "unpausing", "active"),
    Action.SUSPEND: ("active", "suspending", "suspended"),
    Action.RESUME: ("suspended", "resuming", "active"),
    Action.CREATE_IMAGE: ("active stopped paused suspended", "image_snapshot", None),
    Action.CREATE_BACKUP: ("active stopped paused suspended", "image_backup", None),
    Action.SHELVE: ("active stopped paused suspended", "shelving", "shelved"),
    Action.SHELVE_OFFLOAD: ("shelved", "shelving_offloading", "shelved_offloaded"),
    Action.UNSHELVE: ("shelved shelved_offloaded", "unshelving", "active"),
    Action.RESIZE: ("active stopped", "resize_prep", "resized"),
    Action.MIGRATE: ("active stopped", "resize_prep", "resized"),
    Action.CONFIRM_RESIZE: ("resized", None, "active"),
    Action.REVERT_RESIZE: ("resized", "resize_reverting", "active"),
    Action.REBUILD: ("active stopped error", "rebuilding", "active"),
    Action.RESCUE: ("active stopped error", "rescuing", "rescued"),
    Action.UNRESCUE: ("rescued", "unrescuing", "active"),
    Action.LIVE_MIGRATE: ("active paused", "migrating", None),
    Action.EVACUATE: ("active stopped error", "rebuilding", None),
    Action.CHANGE_PASSWORD: ("active", "updating_password", "active"),
    Action.RESTORE: ("soft-delete", "restoring", "active"),
    Action.ATTACH_VOLUME: ("active paused stopped resized soft-delete shelved shelved_offloaded", None, None),
    Action.DETACH_VOLUME: ("active paused stopped resized soft-delete shelved shelved_offloaded", None, None),
    Action.SWAP_VOLUME: ("active paused resized", None, None),
    Action.ATTACH_INTERFACE: ("active paused stopped", None, None),
    Action.DETACH_INTERFACE: ("active paused stopped", None, None),
}
DURING_HARD_REBOOT = """rebooting reboot_pending reboot_started rebooting_hard reboot_pending_hard reboot_started_hard
    pausing unpausing suspending resuming"""
ANY = [Action.DELETE, Action.LOCK, Action.UNLOCK, Action.RESET_STATE]


def is_allowed(rule: str, vm_state: VmState, task: TaskState | None) -> bool:
    try:
        check(rule, "the-id", vm_state, task)
    except WrongState as refused:
        attribute = f"{refused.attribute} {refused.state}"
        action = rule.split()[0]
        assert refused.message == f"Cannot '{action}' instance the-id while it is in {attribute}"
        assert refused.status == 409
        return False
    return True


@pytest.mark.parametrize("rule", TABLE)
def test_action_is_allowed_from_its_states_and_from_no_other(rule: str) -> None:
    begins, first_task, ends = TABLE[rule]
    tasks = {None, *(DURING_HARD_REBOOT.split() if rule == REBOOT_HARD else ())}
    for vm_state, task in itertools.product(VmState, [None, *TaskState]):
        expected = vm_state.value in begins.split() and (task.value if task else None) in tasks
        assert is_allowed(rule, vm_state, task) is expected, (vm_state, task)
    transition = TRANSITIONS[rule]
    assert (transition.task, transition.ends) == (first_task, ends)


@pytest.mark.parametrize("rule", ANY)
def test_some_actions_may_come_at_any_time_while_the_instance_is_there(rule: str) -> None:
    for vm_state, task in itertools.product(VmState, [None, *TaskState]):
        assert is_allowed(rule, vm_state, task) is (vm_state is not VmState.DELETED), (vm_state, task)


def test_wrong_state_names_what_stands_in_the_way() -> None:
    with pytest.raises(WrongState, match=r"Cannot 'start' instance i while it is in vm_state active"):
        check(Action.START, "i", VmState.ACTIVE, None)
    with pytest.raises(WrongState, match=r"Cannot 'reboot' instance i while it is in task_state powering-off"):
        check(REBOOT_SOFT, "i", VmState.ACTIVE, TaskState.POWERING_OFF)


def test_every_rule_is_in_the_table_of_the_contract() -> None:
    assert set(TRANSITIONS) == {*TABLE, *ANY, Action.CREATE, Action.SOFT_DELETE, Action.FIND_GUEST}
    assert TRANSITIONS[Action.CREATE].fails is VmState.ERROR
