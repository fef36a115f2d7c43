"""Hosts that are lost in the middle of an operation, and what must be so when they are back: for all operations."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from instar.bus.contract import Message, Reply
from instar.errors import HostNotReady
from instar.model.commands import GUEST_EVENTS, HOST_QUEUE, WORK_PROGRESS
from instar.model.host import HOST_REPORTS, HostReport
from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from tests.lifecycle.harness import SETTINGS, Plane
from tests.lifecycle.watching import faults
from tests.patience import PATIENCE_S

NO_ANSWER_S, LONG_S, BACK_EVERY_S = 0.2, 3600, 0.05
MISSED_WITHIN_S = 1.0
AWAY, SILENT, UNHEARD = "hypervisor away", "silent", "works unheard"


class Network:
    """Hosts that cannot be reached: what is sent to one of `lost` is never answered, and nothing is heard of it.

    Those in `works` do what they are told, and their answer is lost."""

    def __init__(self, one: Plane) -> None:
        self.lost: set[str] = set()
        self.missed = asyncio.Event()  # something was sent to one of them
        self.works: set[str] = set()
        self.unheard: set[str] = set()  # takes commands, and answers them; only its reports are lost
        bus: Any = one.control.bus
        bus = getattr(bus, "_bus", bus)  # what is counted goes over this one
        self._call, self._publish = bus.call, bus.publish
        bus.call, bus.publish = self.call, self.publish
        self._unheard_work: set[asyncio.Task[Reply]] = set()

    async def call(self, queue: str, message: Message) -> Reply:
        host = queue.removeprefix(HOST_QUEUE) if queue.startswith(HOST_QUEUE) else ""
        if host not in self.lost:
            return await self._call(queue, message)  # type: ignore[no-any-return]
        self.missed.set()
        work = None
        if host in self.works:
            work = asyncio.create_task(self._call(queue, message))
            self._unheard_work.add(work)
            work.add_done_callback(lambda _: None if work.cancelled() else work.exception())
        # Nobody waits here for the whole of a short deadline. A long one is waited for: its caller must know better.
        if message.deadline_s <= SETTINGS.engine.step_deadline_s:
            await asyncio.sleep(NO_ANSWER_S)
            raise TimeoutError
        async with asyncio.timeout(min(LONG_S, message.deadline_s)):
            while host in self.lost:
                await asyncio.sleep(BACK_EVERY_S)
            # It came back before anybody gave it up: a bus keeps what was sent, and what was answered.
            return await (work if work is not None else self._call(queue, message))  # type: ignore[no-any-return]

    async def publish(self, topic: str, message: Message) -> None:
        if topic == HOST_REPORTS:
            host = msgspec.msgpack.decode(message.body, type=HostReport).host
            if host in self.lost or host in self.unheard:
                return
        if topic in (GUEST_EVENTS, WORK_PROGRESS) and self.lost:
            return
        await self._publish(topic, message)


class Loss:
    """`one.around_step = Loss(…)`: at the step of this name the source or the destination of the operation is lost.

    `returns_s`: so long after it was missed first, or only when `come_back` is called (None). `host`: which one it was,
    None where there was none to lose."""

    def __init__(
        self, one: Plane, step: str, role: str, how: str, *, source: str | None, returns_s: float | None = None
    ) -> None:
        self._one, self._step, self._role, self._how, self._source = one, step, role, how, source
        self._returns_s = returns_s
        self._network = Network(one)
        self._tasks: list[asyncio.Task[None]] = []
        self.happened = False
        self.host: str | None = None

    async def __call__(self, name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name == self._step and not self.happened:
            self.happened = True
            self.host = await self._find()
            if self.host is not None:
                self._lose(self.host)
        return await call()

    async def _find(self) -> str | None:
        if self._role == "source":
            return self._source
        rows = await self._one.control.store.read("SELECT host FROM claims ORDER BY host")
        others = [row["host"] for row in rows if row["host"] != self._source]
        return others[0] if others else None

    def _lose(self, host: str) -> None:
        faults(self._one, host).cut_off = True
        if self._how == AWAY:
            faults(self._one, host).down = True
        else:
            self._network.lost.add(host)
            if self._how == UNHEARD:
                self._network.works.add(host)
        if self._returns_s is not None:
            self._tasks.append(asyncio.create_task(self._return_later(self._returns_s)))

    async def _return_later(self, after_s: float) -> None:
        if self._how != AWAY:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MISSED_WITHIN_S):
                    await self._network.missed.wait()
        await asyncio.sleep(after_s)
        self.come_back()

    def come_back(self) -> None:
        self._network.lost.clear()
        self._network.works.clear()
        for host in self._one.hosts:
            faults(self._one, host).clear()


async def look_again(one: Plane) -> None:
    """What the reconciler does by itself after a while, now."""
    for _ in range(2):
        for host in one.hosts:
            await reconciled(one, host)
        await one.control.reconciler.settle_database()
        await one.settled()


async def reconciled(one: Plane, host: str) -> None:
    """A host that was silent is let in again by whoever looks at it first: the reconciler may be at it, too."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await one.control.reconciler.reconcile_host(host)
            except HostNotReady:
                await asyncio.sleep(0.05)


async def places(one: Plane, instance_id: str) -> list[str]:
    """Hosts that have the guest, running or off."""
    censuses = {host: await one.world.host(host).census() for host in one.hosts}
    return [host for host, census in censuses.items() if instance_id in census.guests]


async def check_whole(one: Plane, instance_id: str, about: str) -> Instance:
    """The instance is at rest, record and hosts agree, and there is exactly one guest of it, where the record says."""
    ended = await one.fetch(instance_id)
    assert ended.task_state is None, about
    findings = await one.findings()
    assert findings == [], (about, findings)
    there = await places(one, instance_id)
    off = {VmState.DELETED, VmState.SHELVED_OFFLOADED}
    if ended.vm_state in off or (ended.vm_state is VmState.ERROR and ended.host is None):
        assert there == [], (about, ended.vm_state)
    elif there or ended.vm_state not in (VmState.STOPPED, VmState.SHELVED, VmState.RESIZED, VmState.ERROR):
        assert there == [ended.host], (about, ended.vm_state, ended.facts.fault)
    if ended.host is not None and ended.vm_state is not VmState.ERROR:
        state = await one.world.host(ended.host).observe(instance_id)
        running = {VmState.ACTIVE: PowerState.RUNNING, VmState.PAUSED: PowerState.PAUSED}
        if ended.vm_state in running:
            assert state.power_state is running[ended.vm_state], (about, ended.vm_state, state)
        elif ended.vm_state is VmState.RESCUED:  # stays so when its guest goes off
            assert state.power_state is ended.power_state, (about, state)
        elif ended.vm_state is not VmState.RESIZED:
            assert state.power_state not in (PowerState.RUNNING, PowerState.PAUSED), (about, ended.vm_state, state)
    return ended
