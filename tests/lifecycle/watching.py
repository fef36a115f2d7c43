"""Waiting for what a control plane does by itself, and holding it at a step: for tests of what happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from instar.hypervisor.simulated.faults import HostFaults
from instar.model.instance import Instance
from instar.model.states import VmState
from tests.lifecycle.harness import Plane
from tests.patience import PATIENCE_S


class Held:
    """`plane.around_step = Held(name)`: the step of this name waits, once, before its work, until `go` is set."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.reached = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name == self.step and not self.reached.is_set():
            self.reached.set()
            await self.go.wait()
        return await call()

    async def wait(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.reached.wait()


async def until(what: str, happened: Callable[[], Awaitable[bool]]) -> None:
    """Wait until `happened`. Raises TimeoutError that says `what` did not."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await happened():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise TimeoutError(f"not within {PATIENCE_S} s: {what}") from None


async def until_state(plane: Plane, instance_id: str, vm_state: VmState) -> Instance:
    async def is_so() -> bool:
        instance = await plane.fetch(instance_id)
        return (instance.vm_state, instance.task_state) == (vm_state, None)

    await until(f"instance is {vm_state}", is_so)
    return await plane.fetch(instance_id)


def faults(plane: Plane, host: str | None) -> HostFaults:
    assert host is not None
    return plane.world.host(host).faults


async def check_no_trace(plane: Plane) -> None:
    """Nothing of any guest is left, neither on hosts nor in the records."""
    for host in plane.hosts:
        census = await plane.world.host(host).census()
        assert (census.guests, census.instance_dirs, census.taps, census.networks) == ({}, (), (), ()), (host, census)
    assert await plane.findings() == []
    assert await plane.control.networks.port_owners() == {}
    claims = await plane.control.store.read("SELECT id FROM claims")
    assert not claims
