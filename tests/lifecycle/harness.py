"""A control plane on simulated hosts, in a directory that outlives it: for tests that break operations and look again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from instar.cli.control_plane import ControlPlane
from instar.cli.state_dir import StateDir
from instar.config import (
    EngineSettings,
    HostSettings,
    LifecycleSettings,
    Settings,
    SimulatedSettings,
    StoreSettings,
    VolumeSettings,
)
from instar.engine.run import Run
from instar.http.context import RequestContext
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.lifecycle.audit import Finding, audit
from instar.lifecycle.new_records import NewInstance
from instar.model.instance import Instance, InstanceSpec, SpecImage
from instar.model.network import RequestedNetwork
from instar.model.operation import Operation, Step
from instar.store.flavors import flavor_fetch
from instar.store.instances import instance_fetch
from instar.store.operations import operations_of_instance, operations_unfinished, steps_fetch
from instar.volumes.local import remove_exports
from tests.lifecycle.databases import database_made, database_renamed, on_postgresql, settings_of
from tests.patience import PATIENCE_S

CLOSE_DEADLINE_S = 60.0
LOOK_FIRST_S, LOOK_LAST_S = 0.004, 0.05

SETTINGS = Settings(
    hypervisor="simulated",
    store=StoreSettings(durable=False),
    engine=EngineSettings(poll_s=0.1, lease_s=6.0, step_deadline_s=30),
    host=HostSettings(heartbeat_s=0.2, down_after_s=2, lost_after_s=2, power_sync_s=60),
    lifecycle=LifecycleSettings(wait_soft_reboot_seconds=1, shutdown_grace_s=1),
    simulated=SimulatedSettings(hosts=3),
    volume=VolumeSettings(volumes=-1),
)
# Where no lease and no host is to be lost, however busy the machine is.
UNHURRIED = msgspec.structs.replace(
    SETTINGS,
    engine=EngineSettings(poll_s=0.1, lease_s=10, step_deadline_s=100),
    host=HostSettings(heartbeat_s=0.2, down_after_s=60, lost_after_s=60, power_sync_s=60),
)


class Plane:
    """One life of the control plane. `break_step(name, how)` lies in wait for a step of the next operations."""

    def __init__(self, directory: Path, settings: Settings = SETTINGS, *, boot_id: str = "boot-1") -> None:
        self.state = StateDir(directory)
        settings = settings_of(directory, settings)
        self.world = SimulatedWorld(self.state.simulated_log, settings.simulated)
        self.hosts = [f"sim-{number}" for number in range(settings.simulated.hosts)]
        hypervisors = {host: self.world.host(host) for host in self.hosts}
        self.boot_id = boot_id
        self.control = ControlPlane(self.state, settings, hypervisors, boot_id=lambda: self.boot_id)
        self._wrap_operations()
        self.around_step: Callable[[str, Callable[[], Awaitable[object]]], Awaitable[object]] | None = None
        self.undo_twice = False

    # --- a step that something happens to -----------------------------------------------------------------------------

    def _wrap_operations(self) -> None:
        functions = dict(self.control.conductor._functions)

        def wrap(function: Callable[[Run], Awaitable[None]]) -> Callable[[Run], Awaitable[None]]:
            async def wrapped(run: Run) -> None:
                self._lie_in_wait(run)
                await function(run)

            return wrapped

        self.control.conductor._functions = {action: wrap(function) for action, function in functions.items()}

    def _lie_in_wait(self, run: Run) -> None:
        execute = run._execute

        async def watched(name, call, args, limit_s, *, forward):  # type: ignore[no-untyped-def]
            async def around(*given):  # type: ignore[no-untyped-def]
                if not forward and self.undo_twice:
                    await call(*given)
                if self.around_step is None:
                    return await call(*given)
                return await self.around_step(name, lambda: call(*given))

            return await execute(name, around, args, limit_s, forward=forward)

        run._execute = watched  # type: ignore[method-assign]

    # --- what tests ask ---------------------------------------------------------------------------------------------

    def context(self, project: str = "demo", roles: tuple[str, ...] = ("member", "reader")) -> RequestContext:
        return RequestContext(
            request_id=f"req-{uuid.uuid4()}", user_id="user", user_name="user", project_id=project,
            project_name=project, roles=frozenset(roles),
        )  # fmt: skip

    async def prepare(self, image_file: Path) -> None:
        """An image and the network `private`, once for a directory."""
        await self.control.images.register("tiny", image_file, disk_format="raw", properties={})
        await self.control.networks.bootstrap("10.77.0.0/24")

    async def image(self) -> SpecImage:
        rows = await self.control.store.read("SELECT id FROM images WHERE status = 'active'")
        image = await self.control.images.image_fetch(rows[0]["id"], project_id="demo", is_admin=True)
        return SpecImage(image.id, image.name, virtual_size_bytes=image.virtual_size_bytes)

    async def new(self, name: str = "guest", **spec: object) -> NewInstance:
        flavor = await flavor_fetch(self.control.store, "1", visible_to=None)
        network = await self.control.store.read("SELECT id FROM networks")
        return NewInstance(
            name,
            name,
            msgspec.structs.replace(
                InstanceSpec(
                    flavor=flavor, image=await self.image(), networks=(RequestedNetwork(network_id=network[0]["id"]),)
                ),
                **spec,
            ),
        )

    async def create(self, name: str = "guest", **spec: object) -> Instance:
        (instance,) = await self.control.lifecycle.create(self.context(), [await self.new(name, **spec)])
        return instance

    async def created(self, name: str = "guest", **spec: object) -> Instance:
        instance = await self.create(name, **spec)
        await self.settled()
        return await self.fetch(instance.id)

    async def fetch(self, instance_id: str) -> Instance:
        return await instance_fetch(self.control.store, instance_id)

    async def settled(self) -> None:
        """Nothing is in flight. Raises TimeoutError that names what is."""
        unfinished: list[Operation] = []
        pause_s = LOOK_FIRST_S
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    unfinished = await operations_unfinished(self.control.store)
                    if not unfinished:
                        return
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 1.3, LOOK_LAST_S)  # what takes long is not made slower by the question
        except TimeoutError:
            names = [(operation.action, operation.instance_id) for operation in unfinished]
            raise TimeoutError(f"not settled in {PATIENCE_S} s: {names}") from None

    async def last_operation(self, instance_id: str) -> Operation:
        return (await operations_of_instance(self.control.store, instance_id))[0]

    async def journal(self, instance_id: str) -> list[Step]:
        return await steps_fetch(self.control.store, (await self.last_operation(instance_id)).id)

    async def findings(self) -> list[Finding]:
        return await audit(self.control.cloud, self.hosts)

    async def guests(self) -> dict[str, str]:
        """Running and stopped guests of all hosts: instance → host."""
        found = {}
        for host in self.hosts:
            census = await self.world.host(host).census()
            found |= dict.fromkeys(census.guests, host)
        return found


@asynccontextmanager
async def plane(
    directory: Path,
    settings: Settings = SETTINGS,
    *,
    boot_id: str = "boot-1",
    before: Callable[[Plane], None] = lambda one: None,
) -> AsyncIterator[Plane]:
    """`before` is told of it before it opens, and takes up what an earlier life has left."""
    await database_made(directory)
    one = Plane(directory, settings, boot_id=boot_id)
    before(one)
    await one.control.open()
    try:
        await hosts_up(one)
        yield one
    finally:
        await closed(one)
        one.world.close()
        await asyncio.to_thread(remove_exports, one.state.path)


async def closed(one: Plane) -> None:
    """Raises TimeoutError that says what does not end."""
    closing = asyncio.create_task(one.control.close(), name="close")
    done, _ = await asyncio.wait([closing], timeout=CLOSE_DEADLINE_S)
    if not done:
        left = [f"{task.get_name()}: {task.get_stack(limit=1)} {task.get_coro()}" for task in asyncio.all_tasks()]
        closing.cancel()
        raise TimeoutError(f"not closed in {CLOSE_DEADLINE_S} s; at work: " + "; ".join(left))
    await closing


@asynccontextmanager
async def prepared(
    directory: Path, image_file: Path, settings: Settings = SETTINGS, *, boot_id: str = "boot-1"
) -> AsyncIterator[Plane]:
    """A plane in an empty directory, with an image and a network: a copy of one that lies beside `image_file`."""
    template = image_file.with_name("prepared-postgresql" if on_postgresql() else "prepared")
    if not template.exists():
        half = image_file.with_name(f"prepared-{uuid.uuid4()}")  # several may make it at once
        async with plane(half, UNHURRIED) as one:
            await one.prepare(image_file)
        with contextlib.suppress(OSError):
            half.rename(template)
            await database_renamed(half, template)
    shutil.copytree(template, directory, dirs_exist_ok=True)
    await database_made(directory, template)
    async with plane(directory, settings, boot_id=boot_id) as one:
        yield one


async def hosts_up(one: Plane) -> None:
    """All but those that an admin said to be down; those of an earlier life are admitted again."""

    def is_seen(host: str) -> bool:
        known = one.control.hosts.get(host)
        return known is not None and (known.forced_down or (one.control.hosts.is_up(host) and not known.shut))

    async with asyncio.timeout(PATIENCE_S):
        while not all(is_seen(host) for host in one.hosts):
            await asyncio.sleep(0.005)
