"""Ten clients do two hundred random operations to twenty instances at once, held against a model of the contract.

An operation is accepted exactly when the table says so of the state at that moment. When all have settled, the operations
that the record calls successful, one after another, explain the state of each instance and what is on its disk."""

from __future__ import annotations

import asyncio
import random
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from instar.config import LifecycleSettings, QuotaSettings
from instar.errors import Conflict, NotFound, WrongState
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.rebuild import RebuildArguments
from instar.lifecycle.shelve import UnshelveArguments
from instar.lifecycle.snapshot import SnapshotArguments
from instar.model.instance import Instance
from instar.model.operation import Operation
from instar.model.states import PowerState, VmState
from instar.store.flavors import flavor_fetch
from instar.store.operations import operations_of_instance
from tests.lifecycle.harness import SETTINGS, Plane, plane
from tests.lifecycle.losing import check_whole, look_again
from tests.lifecycle.watching import check_no_trace, faults

INSTANCES, CLIENTS, ROUNDS, OPERATIONS_OF_CLIENT = 20, 10, 4, 5  # two hundred operations
QUICK = msgspec.structs.replace(
    SETTINGS,
    quota=QuotaSettings(instances=-1, cores=-1, ram=-1),
    lifecycle=LifecycleSettings(wait_soft_reboot_seconds=0.05, shutdown_grace_s=0.05),
)
ON = frozenset({"active"})
WITH_DISK = frozenset({"active", "stopped", "paused", "suspended"})
MOVABLE = frozenset({"active", "stopped"})
# The contract: from which vm_states, with no task_state. A hard reboot and a delete may come during others.
ALLOWED: dict[str, frozenset[str]] = {
    "start": frozenset({"stopped"}),
    "stop": frozenset({"active", "error"}),
    "soft": ON,
    "hard": frozenset({"active", "stopped", "paused", "suspended", "error", "rescued"}),
    "pause": ON,
    "unpause": frozenset({"paused"}),
    "suspend": ON,
    "resume": frozenset({"suspended"}),
    "create_image": WITH_DISK,
    "shelve": WITH_DISK,
    "unshelve": frozenset({"shelved", "shelved_offloaded"}),
    "shelve_offload": frozenset({"shelved"}),
    "resize": MOVABLE,
    "migrate": MOVABLE,
    "confirm_resize": frozenset({"resized"}),
    "revert_resize": frozenset({"resized"}),
    "rebuild": frozenset({"active", "stopped", "error"}),
    "rescue": frozenset({"active", "stopped", "error"}),
    "unrescue": frozenset({"rescued"}),
    "migrate_live": frozenset({"active", "paused"}),
    "delete": frozenset(state.value for state in VmState) - {"deleted"},
}
DURING = {
    "hard": frozenset({"rebooting", "reboot_pending", "reboot_started", "rebooting_hard", "reboot_pending_hard",
                       "reboot_started_hard", "pausing", "unpausing", "suspending", "resuming"}),
}  # fmt: skip
RARE = frozenset({"delete"})


def is_allowed(action: str, instance: Instance) -> bool:
    task = instance.task_state.value if instance.task_state else None
    during = action == "delete" or task is None or task in DURING.get(action, frozenset())
    return instance.vm_state.value in ALLOWED[action] and during


class Expected:
    """What the successful operations of an instance make of it."""

    def __init__(self) -> None:
        self.vm_state = "building"
        self.data: dict[str, str] = {}
        self._was = "active"
        self._kept: dict[str, str] = {}
        self._seen = 0

    def follow(self, operations: list[Operation]) -> None:
        """Those that are new, the oldest first."""
        for operation in operations[self._seen :]:
            if operation.result == "Success":
                self._do(operation.action)
        self._seen = len(operations)

    def _do(self, action: str) -> None:
        before = self.vm_state
        stays_off = "stopped" if before == "stopped" else "active"
        ends: dict[str, Callable[[], str]] = {
            "create": lambda: "active", "start": lambda: "active", "stop": lambda: "stopped",
            "reboot": lambda: "rescued" if before == "rescued" else "active", "pause": lambda: "paused",
            "unpause": lambda: "active", "suspend": lambda: "suspended", "resume": lambda: "active",
            "shelve": lambda: "shelved_offloaded", "unshelve": lambda: "active", "resize": lambda: "resized",
            "migrate": lambda: "resized", "confirmResize": lambda: self._was, "revertResize": lambda: self._was,
            "rebuild": lambda: stays_off, "rescue": lambda: "rescued", "unrescue": lambda: "active",
            "delete": lambda: "deleted",
        }  # fmt: skip
        if action in ("resize", "migrate"):
            self._was, self._kept = before, dict(self.data)
        elif action == "revertResize":
            self.data = dict(self._kept)
        elif action == "rebuild":
            self.data = {}
        self.vm_state = ends[action]() if action in ends else before


class Life:
    def __init__(self, one: Plane, seed: int) -> None:
        self.one, self.random = one, random.Random(seed)
        self.expected: dict[str, Expected] = {}
        self.accepted = self.refused = 0
        self.told: list[str] = []

    async def live(self) -> None:
        made = await asyncio.gather(*(self.one.create(f"guest-{number}") for number in range(INSTANCES)))
        self.expected = {instance.id: Expected() for instance in made}
        await self.check()
        for turn in range(ROUNDS):
            await self.write(f"round-{turn}")
            seeds = [self.random.random() for _ in range(CLIENTS)]
            await asyncio.gather(*(self.client(random.Random(seed)) for seed in seeds))
            await self.check()
        await self.end()

    async def client(self, chance: random.Random) -> None:
        for _ in range(OPERATIONS_OF_CLIENT):
            instance = await self.one.fetch(chance.choice(list(self.expected)))
            fitting = [action for action in ALLOWED if is_allowed(action, instance) and action not in RARE]
            # Mostly what makes sense, so that lives get far; else anything, which is mostly refused.
            fits = bool(fitting) and chance.random() < 0.7
            action = chance.choice(fitting if fits else list(ALLOWED))
            await self.try_one(action, instance)
            await asyncio.sleep(chance.random() * 0.01)

    async def try_one(self, action: str, instance: Instance) -> None:
        allowed = is_allowed(action, instance)
        about = f"{action} of {instance.id} in {instance.vm_state}, {instance.task_state}"
        try:
            await self.act(action, instance)
        except (WrongState, NotFound) as error:
            self.refused += 1
            now = await self.one.fetch(instance.id)
            changed = (now.vm_state, now.task_state, now.turn) != (instance.vm_state, instance.task_state, instance.turn)
            # A confirmation has no task_state that one could see.
            assert not allowed or changed or "confirming" in str(error), f"{about} was refused: {error}"
        except Conflict as error:
            assert not allowed, f"{about} was refused: {error}"
            self.refused += 1
        else:
            assert allowed, f"{about} was accepted"
            self.accepted += 1
        self.told.append(about)

    async def act(self, action: str, instance: Instance) -> None:
        door, context = self.one.control.lifecycle, self.one.context(roles=("admin", "member", "reader"))
        if action in ("soft", "hard"):
            await door.reboot(context, instance, hard=action == "hard")
            return
        flavor = await flavor_fetch(self.one.control.store, "2" if instance.spec.flavor.id != "2" else "3", visible_to=None)
        image = await self.one.control.images.image_fetch(instance.spec.image.id, project_id="demo", is_admin=True)
        assert instance.spec.image is not None
        given_: dict[str, tuple[object, ...]] = {
            "create_image": (SnapshotArguments(str(uuid.uuid4()), "copy"),),
            "unshelve": (UnshelveArguments(),),
            "resize": (flavor,),
            "rebuild": (RebuildArguments(image=instance.spec.image, spec=instance.spec, name=instance.name),),
            "rescue": (image.id,),
            "migrate_live": (LiveArguments(),),
        }
        await getattr(door, action)(context, instance, *given_.get(action, ()))

    async def write(self, text: str) -> None:
        for instance_id, expected in self.expected.items():
            if expected.vm_state == "active":
                instance = await self.one.fetch(instance_id)
                faults(self.one, instance.host).write_data(instance_id, "root", text, text)
                expected.data[text] = text

    async def check(self) -> None:
        """Everything has settled as the model says."""
        await self.one.settled()
        await look_again(self.one)
        for instance_id, expected in self.expected.items():
            operations = await operations_of_instance(self.one.control.store, instance_id)
            expected.follow(list(reversed(operations)))
            told = [f"{one.action}: {one.result} {one.message or ''}" for one in reversed(operations)]
            instance = await check_whole(self.one, instance_id, f"{told}")
            assert instance.vm_state.value == expected.vm_state, told
            if instance.host is not None and instance.vm_state is not VmState.DELETED:
                assert faults(self.one, instance.host).read_data(instance_id) == expected.data, told
            assert instance.vm_state is not VmState.ACTIVE or instance.power_state is PowerState.RUNNING, told

    async def end(self) -> None:
        for instance_id in self.expected:
            instance = await self.one.fetch(instance_id)
            if instance.vm_state is not VmState.DELETED:
                await self.act("delete", instance)
        await self.one.settled()
        await check_no_trace(self.one)


@pytest.mark.slow
@settings(
    max_examples=5, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False, phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(seed=st.integers(0, 2**32))
def test_two_hundred_random_operations_of_ten_clients(seed: int) -> None:
    async def live() -> None:
        with tempfile.TemporaryDirectory(prefix="instar-life-") as directory:
            image = Path(directory) / "disk.raw"
            image.write_bytes(bytes(1 << 20))
            async with plane(Path(directory) / "cloud", QUICK) as one:
                await one.prepare(image)
                life = Life(one, seed)
                try:
                    await life.live()
                finally:
                    note(f"seed {seed}: {life.accepted} accepted, {life.refused} refused, {life.told}")
                assert life.accepted >= 60, "the lives do not get far"

    asyncio.run(live())
