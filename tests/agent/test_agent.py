"""The agent of a host: stale commands refused, one at a time for an instance, waits that give way, reports that go on."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from instar import __version__
from instar.agent.agent import REPORTS_PER_HEARTBEAT, REPORTS_TOGETHER_MAX, Agent
from instar.agent.fence import Fence
from instar.agent.locks import Locks
from instar.bus.contract import Message, Reply
from instar.bus.memory import MemoryBus
from instar.config import HostSettings, SimulatedSettings
from instar.engine.hosts import LOOK_EVERY_S, HostClient
from instar.errors import (
    CommandUnknown,
    HostUnreachable,
    HypervisorUnavailable,
    StaleEpoch,
    StepFailed,
    StepTimeout,
    revive,
)
from instar.hypervisor.simulated.driver import SimulatedHypervisor
from instar.hypervisor.simulated.power import Power
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.model.guest import DiskDefinition, GuestDefinition
from instar.model.host import HOST_REPORTS, HOST_REPORTS_TOGETHER, HostReport, HostReports
from instar.model.states import PowerState
from tests.patience import PATIENCE_S

HOST = "sim-0"
DISK = DiskDefinition("root", 1 << 30)


class Bench:
    """One host, its agent, a bus, and clients of operations on one instance."""

    def __init__(self, fence: Path) -> None:
        self.bus = MemoryBus()
        self.world = SimulatedWorld(None, SimulatedSettings())
        self.hypervisor: SimulatedHypervisor = self.world.host(HOST)
        self.fence = fence
        self.instance_id = str(uuid.uuid4())
        self.reports: list[HostReport] = []
        self.agent = self.new_agent()

    def new_agent(self) -> Agent:
        settings = HostSettings(heartbeat_s=0.02)
        return Agent({HOST: self.hypervisor}, self.bus, Fence(self.fence), settings, boot_id=lambda: "boot-1")

    async def open(self) -> None:
        async def remember(message: Message) -> None:
            self.reports.append(msgspec.msgpack.decode(message.body, type=HostReport))

        await self.bus.open()
        await self.bus.subscribe(HOST_REPORTS, remember)
        await self.agent.open()

    async def restart_agent(self) -> None:
        await self.agent.close()
        self.agent = self.new_agent()
        await self.agent.open()

    def client(self, epoch: int, deadline_s: float = 5.0) -> HostClient:
        return HostClient(self.bus, instance_id=self.instance_id, epoch=epoch, deadline_s=deadline_s)

    async def start_guest(self, epoch: int) -> None:
        client = self.client(epoch)
        await client.ensure_disk(HOST, DISK)
        await client.ensure_running(HOST, GuestDefinition(self.instance_id, "guest", 1, 128, (DISK,)))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "fences")
    await made.open()
    yield made
    await made.agent.close()
    await made.bus.close()
    made.world.close()


async def test_command_of_an_older_epoch_is_refused_and_does_nothing(bench: Bench) -> None:
    await bench.start_guest(5)
    await bench.client(6).observe(HOST)
    with pytest.raises(StaleEpoch):
        await bench.client(5).ensure_absent(HOST)
    assert (await bench.hypervisor.observe(bench.instance_id)).power_state is PowerState.RUNNING


async def test_older_epoch_is_refused_after_the_agent_was_restarted(bench: Bench) -> None:
    await bench.start_guest(5)
    await bench.restart_agent()
    with pytest.raises(StaleEpoch):
        await bench.client(4).ensure_absent(HOST)
    await bench.client(5).observe(HOST)


async def test_command_that_waited_while_a_newer_operation_came_is_refused(bench: Bench) -> None:
    await bench.start_guest(1)
    bench.hypervisor.faults.hang_next("ensure_disk")
    first = asyncio.create_task(bench.client(1).ensure_disk(HOST, DISK))
    await asyncio.sleep(0)
    stale = asyncio.create_task(bench.client(1).ensure_absent(HOST))
    await asyncio.sleep(0)
    newer = asyncio.create_task(bench.client(2).observe(HOST))
    await asyncio.sleep(0.01)
    bench.hypervisor.faults.release()
    await first
    with pytest.raises(StaleEpoch):
        await stale
    assert (await newer).power_state is PowerState.RUNNING


async def test_commands_for_one_instance_never_overlap_and_those_for_others_do(bench: Bench) -> None:
    running, most, order = 0, 0, []
    work = bench.hypervisor.ensure_disk

    async def watched(instance_id: str, disk: DiskDefinition) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        order.append(disk.name)
        await work(instance_id, disk)
        running -= 1

    bench.hypervisor.ensure_disk = watched  # type: ignore[method-assign]
    disks = [DiskDefinition(f"disk{number}", 1) for number in range(6)]
    await asyncio.gather(*(bench.client(1).ensure_disk(HOST, disk) for disk in disks))
    assert (most, order) == (1, [disk.name for disk in disks])
    clients = [HostClient(bench.bus, instance_id=str(uuid.uuid4()), epoch=1) for _ in range(4)]
    await asyncio.gather(*(client.ensure_disk(HOST, DISK) for client in clients))
    assert most == 4


@pytest.mark.parametrize("waiting", ["stop", "soft reboot"])
async def test_wait_for_a_guest_gives_way_to_a_newer_operation_but_not_to_its_own(bench: Bench, waiting: str) -> None:
    await bench.start_guest(1)
    bench.hypervisor.faults.ignores_acpi = True
    domain_id = (await bench.client(1).observe(HOST)).domain_id
    assert domain_id is not None
    client = bench.client(1)
    wait = client.ensure_stopped(HOST, 60) if waiting == "stop" else client.await_soft_reboot(HOST, domain_id, 60)
    old = asyncio.ensure_future(wait)
    await asyncio.sleep(0.01)
    same = asyncio.create_task(bench.client(1).observe(HOST))
    await asyncio.sleep(0.05)
    assert not old.done()
    assert not same.done()
    async with asyncio.timeout(PATIENCE_S):
        assert (await bench.client(2).observe(HOST)).domain_id == domain_id, "nobody ended the guest"
    for task in (old, same):
        with pytest.raises(StaleEpoch):
            await task


async def test_end_of_a_guest_is_not_cut_short_when_the_grace_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "fences")
    bench.world = SimulatedWorld(None, SimulatedSettings(destroy_s=0.1))
    bench.hypervisor = bench.world.host(HOST)
    bench.agent = bench.new_agent()
    await bench.open()
    await bench.start_guest(1)
    bench.hypervisor.faults.ignores_acpi = True
    destroy, destroying = Power._destroy, asyncio.Event()

    async def watched(power: Power, instance_id: str) -> None:
        destroying.set()
        await destroy(power, instance_id)

    monkeypatch.setattr(Power, "_destroy", watched)
    old = asyncio.create_task(bench.client(1).ensure_stopped(HOST, 0.01))
    async with asyncio.timeout(PATIENCE_S):
        await destroying.wait()
    newer = await bench.client(2).observe(HOST)
    assert newer.power_state is PowerState.SHUTDOWN, "the newer command saw the guest while it was being ended"
    assert (await old).power_state is PowerState.SHUTDOWN
    await bench.agent.close()
    await bench.bus.close()


async def test_reports_go_on_while_the_hypervisor_is_away_and_say_so(bench: Bench) -> None:
    bench.hypervisor.faults.down = True
    async with asyncio.timeout(PATIENCE_S):
        while not bench.reports or bench.reports[-1].hypervisor_ok:
            await asyncio.sleep(0.005)
    assert bench.reports[-1].inventory is None
    with pytest.raises(HypervisorUnavailable, match="The hypervisor of host sim-0 is not available"):
        await bench.client(1).observe(HOST)
    bench.hypervisor.faults.down = False
    async with asyncio.timeout(PATIENCE_S):
        while not bench.reports[-1].hypervisor_ok:
            await asyncio.sleep(0.005)
    assert bench.reports[-1].inventory is not None


async def test_host_is_up_again_when_a_hypervisor_that_was_away_at_the_start_comes_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "fences")
    bench.hypervisor.faults.down = True
    await bench.open()
    bench.hypervisor.faults.down = False
    async with asyncio.timeout(PATIENCE_S):
        while not bench.reports or not bench.reports[-1].hypervisor_ok:
            await asyncio.sleep(0.005)
    await bench.agent.close()
    await bench.bus.close()


async def test_jump_of_the_hosts_clock_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jump = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + jump) * 1e9))
    for years in (1, -1):
        jump = 86_400.0 * 365 * years
        heard = len(bench.reports)
        async with asyncio.timeout(PATIENCE_S):
            while len(bench.reports) < heard + 3:
                await asyncio.sleep(0.005)
        await bench.client(3).observe(HOST)
        with pytest.raises(StaleEpoch):
            await bench.client(2).observe(HOST)
    assert len({(report.boot_id, report.agent_id) for report in bench.reports}) == 1


async def test_answer_that_does_not_come_names_what_was_waited_for(bench: Bench) -> None:
    bench.hypervisor.faults.hang_next("observe")
    with pytest.raises(StepTimeout, match=r"Waited 0\.05 seconds for host sim-0 to answer Observe"):
        await bench.client(1, deadline_s=0.05).observe(HOST)


async def test_host_without_an_agent_cannot_be_reached(bench: Bench) -> None:
    with pytest.raises(HostUnreachable):
        await bench.client(1).observe("elsewhere")


async def test_a_host_that_falls_silent_while_it_works_is_given_up(bench: Bench) -> None:
    silent = False
    client = HostClient(bench.bus, instance_id=bench.instance_id, epoch=1, fell_silent=lambda _host, _waited_s: silent)
    bench.hypervisor.faults.hang_next("observe")
    asked = asyncio.create_task(client.observe(HOST))
    done, _ = await asyncio.wait((asked,), timeout=2 * LOOK_EVERY_S)
    assert not done, "it works, and shows that it lives"
    silent = True
    with pytest.raises(HostUnreachable):
        await asked
    with pytest.raises(HostUnreachable):
        await client.observe(HOST)
    silent = False
    bench.hypervisor.faults.release()
    assert not (await client.observe(HOST)).exists


async def test_a_host_that_is_not_ready_after_a_long_outage_is_asked_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the bus was away the agent shut its host: what was asked before is not given up for the time that this took."""
    monkeypatch.setattr("instar.engine.hosts.NOT_READY_MAX_S", 0.3)
    asked = 0

    async def cut_off_at_first(_: Message) -> Reply:
        nonlocal asked
        asked += 1
        if asked == 1:
            await asyncio.sleep(0.6)
            return Reply(error=("HostNotReady", "", {"host": "late"}))
        return Reply(msgspec.msgpack.encode(None))

    await bench.bus.serve("host.late", cut_off_at_first, concurrency_max=1)
    await bench.client(1).ensure_absent("late")
    assert asked == 2


async def test_defect_in_a_driver_is_a_clear_failure_and_the_agent_goes_on(bench: Bench) -> None:
    bench.hypervisor.faults.fail_next("observe", ZeroDivisionError("/secret/path"))
    with pytest.raises(StepFailed, match="Observe on host sim-0 failed") as failure:
        await bench.client(1).observe(HOST)
    assert "/secret/path" not in str(failure.value)
    assert not (await bench.client(1).observe(HOST)).exists


async def test_command_of_another_version_is_refused_clearly(bench: Bench) -> None:
    for kind, body in (("EnsureWorldPeace", b"\x80"), ("EnsureDisk", b"\x80"), ("Observe", b"\xc1")):
        reply = await bench.bus.call(f"host.{HOST}", Message(kind, body, 1.0))
        assert reply.error is not None
        error = revive(*reply.error)
        assert isinstance(error, CommandUnknown)
        assert error.message == f"The agent of host sim-0 (version {__version__}) does not understand {kind}."


async def test_locks_exist_only_while_somebody_wants_them() -> None:
    locks = Locks()

    async def hold(name: str) -> None:
        async with locks.hold(name):
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(hold(name)) for name in "aab"]
    await asyncio.sleep(0)
    tasks[1].cancel()  # while it waits
    await asyncio.gather(*tasks, return_exceptions=True)
    assert locks._locks == {}


async def test_an_agent_of_many_hosts_reports_them_together_and_each_once_in_a_heartbeat(tmp_path: Path) -> None:
    bus, world = MemoryBus(), SimulatedWorld(None, SimulatedSettings())
    hosts = {f"sim-{number}": world.host(f"sim-{number}") for number in range(REPORTS_TOGETHER_MAX + 50)}
    rounds: list[list[HostReport]] = []

    async def remember(message: Message) -> None:
        rounds.append(list(msgspec.msgpack.decode(message.body, type=HostReports).reports))

    await bus.open()
    await bus.subscribe(HOST_REPORTS_TOGETHER, remember)
    settings = HostSettings(heartbeat_s=0.05)
    agent = Agent(
        hosts, bus, Fence(tmp_path / "fences"), settings, boot_id=lambda: "boot-1", reports_together=True
    )
    await agent.open()
    try:
        async with asyncio.timeout(30):
            while len(rounds) < 2 + REPORTS_PER_HEARTBEAT * 2:
                await asyncio.sleep(0.005)
    finally:
        await agent.close()
        await bus.close()
        world.close()
    assert [len(reports) for reports in rounds[:2]] == [REPORTS_TOGETHER_MAX, 50]
    assert [report.host for reports in rounds[:2] for report in reports] == list(hosts)
    told = [report.host for reports in rounds[2:] for report in reports]
    assert told[: len(hosts)] == list(hosts)
    asked = [report.host for reports in rounds for report in reports if report.ask]
    assert asked[:2] == ["sim-0", "sim-1"], "one of them asks in each round, by turns"
