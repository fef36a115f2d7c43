"""Hosts, instances and schedulers for the tests of scheduling: a real store, a host table with a clock that is set."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec

from instar.config import Settings
from instar.model.guest import HostInventory
from instar.model.host import HostReport
from instar.model.instance import Flavor, Instance, InstanceFacts, InstanceSpec
from instar.model.states import PowerState, TaskState, VmState
from instar.scheduling.host_table import HostTable
from instar.scheduling.scheduler import Scheduler, SchedulingRequest
from instar.store.contract import Store
from instar.store.instances import instance_insert
from instar.store.sqlite import SqliteStore

SMALL = Flavor(id="1", name="small", vcpus=1, memory_mib=1024, root_gib=10)


class Clock:
    """A monotonic clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SmallCloud:
    """A store in `path`, with one host table and one scheduler on it."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.clock = Clock()
        self.table = HostTable(store, settings, clock=self.clock)
        self.scheduler = Scheduler(store, self.table, settings)

    @classmethod
    async def opened(cls, path: Path, **sections: Any) -> SmallCloud:
        store = SqliteStore(path, durable=False)
        await store.open()
        return cls(store, msgspec.structs.replace(Settings(), **sections))

    async def report(self, *names: str, persist: bool = True, ok: bool = True, boot: str = "b", **has: Any) -> None:
        for name in names:
            self.table.hear(report(name, ok=ok, boot=boot, **has))
        if persist:
            await self.table.persist()

    async def instance(self, *, group_id: str | None = None, flavor: Flavor = SMALL, project: str = "p") -> str:
        instance_id = str(uuid.uuid4())
        await self.store.write(instance_insert(instance(instance_id, flavor, group_id, project)))
        return instance_id

    async def claimed(self) -> dict[str, tuple[int, int, int, int]]:
        """Host → claimed vcpus, MiB, GiB, instances."""
        rows = await self.store.read("SELECT * FROM hosts ORDER BY name")
        return {
            row["name"]: (
                row["vcpus_claimed"], row["memory_claimed_mib"], row["disk_claimed_gib"], row["instances_claimed"],
            )
            for row in rows
        }  # fmt: skip


def inventory(name: str = "host", **has: Any) -> HostInventory:
    values: dict[str, Any] = {
        "vcpus": 4, "memory_mib": 8192 + 512, "disk_gib": 101, "hypervisor_type": "QEMU", "hypervisor_version": 7,
        "hypervisor_hostname": f"{name}.example",
    }  # fmt: skip
    return HostInventory(**{**values, **has})


def report(name: str, *, ok: bool = True, boot: str = "b", **has: Any) -> HostReport:
    return HostReport(name, boot, "agent", ok, inventory(name, **has) if ok else None)


def request(flavor: Flavor = SMALL, **values: Any) -> SchedulingRequest:
    return SchedulingRequest(**{"instance_id": "new", "project_id": "p", "flavor": flavor, **values})


def flavor(**values: Any) -> Flavor:
    return msgspec.structs.replace(SMALL, **values)


def instance(instance_id: str, flavor: Flavor, group_id: str | None, project: str) -> Instance:
    values: dict[str, Any] = {
        "id": instance_id, "project_id": project, "user_id": "u", "name": "n", "hostname": "n",
        "vm_state": VmState.BUILDING, "task_state": TaskState.SCHEDULING, "power_state": PowerState.NOSTATE,
        "host": None, "availability_zone": None, "created_at": 1, "updated_at": 1, "launched_at": None,
        "terminated_at": None, "locked_by": None, "reservation_id": "r", "epoch": 0, "turn": 1, "revision": 0,
        "spec": InstanceSpec(flavor=flavor, group_id=group_id), "facts": InstanceFacts(),
    }  # fmt: skip
    return Instance(**{name: values[name] for name in Instance.__struct_fields__ if name in values})
