"""What simulated hosts can beyond the contract: survive kill -9, take their time, and make trouble on demand."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from instar.config import SimulatedSettings
from instar.errors import DiskFull, HypervisorError, HypervisorUnavailable, ImageGone
from instar.hypervisor.simulated import SimulatedHypervisor, SimulatedWorld
from instar.hypervisor.simulated import change_log as change_log_module
from instar.model.guest import ConfigDrive, DiskDefinition, GuestDefinition, GuestEvent, GuestState, ImageSource
from instar.model.network import FixedIp, NetworkDefinition, PortDefinition
from instar.model.states import PowerState

IMAGE = ImageSource("image", "http://images.invalid/image", "qcow2", "0" * 64, 1, 1)
NETWORK = NetworkDefinition(id="network", mtu=1450, subnets=())


@pytest.fixture
def world() -> Iterator[SimulatedWorld]:
    opened = SimulatedWorld(None, SimulatedSettings())
    yield opened
    opened.close()


def definition() -> GuestDefinition:
    instance_id = str(uuid.uuid4())
    address = FixedIp(subnet_id="subnet", ip_address="10.0.0.9", prefix_length=24)
    port = PortDefinition(str(uuid.uuid4()), NETWORK, "fa:16:3e:00:00:01", (address,))
    disk = DiskDefinition("root", 1 << 30, IMAGE)
    drive = ConfigDrive(meta_data='{"hostname": "web-1", "uuid": "x"}', network_data="{}")
    return GuestDefinition(instance_id, "instance-1", 1, 512, (disk,), (port,), drive)


async def started(host: SimulatedHypervisor) -> GuestDefinition:
    guest = definition()
    await host.ensure_image(IMAGE)
    await host.ensure_disk(guest.instance_id, guest.disks[0])
    await host.ensure_ports(guest.instance_id, guest.ports)
    await host.ensure_running(guest)
    return guest


# --- surviving -------------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, sys
from pathlib import Path
from instar.config import SimulatedSettings
from instar.hypervisor.simulated import SimulatedWorld
from tests.hypervisor.test_simulated import started

async def main():
    world = SimulatedWorld(Path(sys.argv[1]), SimulatedSettings())
    number = 0
    while True:
        host = world.host(f"h{number % 7}")
        guest = await started(host)
        state = await host.observe(guest.instance_id)
        print(host.name, guest.instance_id, state.domain_id, flush=True)
        if number % 3 == 2:
            await host.ensure_absent(guest.instance_id, keep_disks=False)
            print(host.name, guest.instance_id, "absent", flush=True)
        number += 1

asyncio.run(main())
"""


def lines_until_killed(path: Path) -> list[str]:
    """Run the child until it has told of much work, kill it in the midst of it, and return what it told."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(500)]
        child.kill()
        lines += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    return lines


async def test_what_was_done_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "world.log"
    lines = await asyncio.to_thread(lines_until_killed, path)
    told: dict[str, tuple[str, str]] = {}
    for line in (line for line in lines if line.endswith("\n")):
        host, instance_id, what = line.split()
        told[instance_id] = (host, what)
    world = SimulatedWorld(path, SimulatedSettings())
    for number, (instance_id, (host, what)) in enumerate(told.items()):
        state = await world.host(host).observe(instance_id)
        census = await world.host(host).census()
        if what == "absent":
            assert state == GuestState(False)
            assert instance_id not in census.instance_dirs
        elif number < len(told) - 1:  # the last may have been on its way out
            assert state == GuestState(True, PowerState.RUNNING, int(what))
            assert instance_id in census.instance_dirs
    world.close()


async def test_a_torn_last_record_is_ignored_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "world.log"
    for torn in range(1, 40, 3):
        path.unlink(missing_ok=True)
        world = SimulatedWorld(path, SimulatedSettings())
        first = await started(world.host("h"))
        whole = path.stat().st_size
        await started(world.host("h"))
        world.close()
        os.truncate(path, whole + torn)
        again = SimulatedWorld(path, SimulatedSettings())
        third = await started(again.host("h"))
        again.close()
        last = SimulatedWorld(path, SimulatedSettings())
        assert set((await last.host("h").census()).guests) == {first.instance_id, third.instance_id}
        last.close()


async def test_domain_ids_boot_counts_and_console_go_on_after_a_restart(tmp_path: Path) -> None:
    world = SimulatedWorld(tmp_path / "world.log", SimulatedSettings())
    guest = await started(world.host("h"))
    await world.host("h").ensure_absent(guest.instance_id, keep_disks=True)
    world.close()
    world = SimulatedWorld(tmp_path / "world.log", SimulatedSettings())
    host = world.host("h")
    await host.ensure_ports(guest.instance_id, guest.ports)
    assert (await host.ensure_running(guest)).domain_id == 2
    console = (await host.console_output(guest.instance_id, length_bytes=10_000)).decode().splitlines()
    address = "INSTAR-NET eth0 address=10.0.0.9/24 mac=fa:16:3e:00:00:01"
    marker = f"uuid={guest.instance_id} hostname=web-1"
    assert console == [f"INSTAR-BOOT count=1 {marker}", address, f"INSTAR-BOOT count=2 {marker}", address]
    world.close()


async def test_the_log_is_rewritten_when_it_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_log_module, "COMPACT_MIN_BYTES", 20_000)
    path = tmp_path / "world.log"
    world = SimulatedWorld(path, SimulatedSettings())
    guest = await started(world.host("h"))
    for _ in range(500):
        await world.host("h").ensure_stopped(guest.instance_id, grace_s=0)
        await world.host("h").ensure_running(guest)
    state = await world.host("h").observe(guest.instance_id)
    assert path.stat().st_size < 400_000
    world.close()
    again = SimulatedWorld(path, SimulatedSettings())
    assert await again.host("h").observe(guest.instance_id) == state == GuestState(True, PowerState.RUNNING, 501)
    assert len(await again.host("h").console_output(guest.instance_id, length_bytes=1 << 20)) == 65_536
    again.close()


async def test_a_closed_world_changes_no_more(tmp_path: Path) -> None:
    world = SimulatedWorld(tmp_path / "world.log", SimulatedSettings())
    world.close()
    with pytest.raises(OSError, match="closed"):
        await world.host("h").ensure_image(IMAGE)


# --- time ------------------------------------------------------------------------------------------------------------


async def test_latencies_are_taken() -> None:
    settings = SimulatedSettings(spawn_s=0.05, destroy_s=0.06, shutdown_s=0.07, image_s=0.4)
    host = SimulatedWorld(None, settings).host("h")
    guest = definition()

    async def took(call: object) -> float:
        began = time.perf_counter()
        await call  # type: ignore[misc]
        return time.perf_counter() - began

    fetched = [host.ensure_image(IMAGE) for _ in range(5)]
    assert 0.4 <= await took(asyncio.gather(*fetched)) < 1.9  # many callers, one copy
    await host.ensure_disk(guest.instance_id, guest.disks[0])
    await host.ensure_ports(guest.instance_id, guest.ports)
    assert await took(host.ensure_running(guest)) >= 0.05
    assert await took(host.ensure_stopped(guest.instance_id, grace_s=5)) >= 0.07
    await host.ensure_running(guest)
    assert await took(host.ensure_stopped(guest.instance_id, grace_s=0)) >= 0.06


# --- faults ----------------------------------------------------------------------------------------------------------


async def test_the_next_calls_of_a_method_fail(world: SimulatedWorld) -> None:
    host = world.host("h")
    host.faults.fail_next("ensure_image", times=2)
    for _ in range(2):
        with pytest.raises(HypervisorError):
            await host.ensure_image(IMAGE)
    await host.ensure_image(IMAGE)
    assert (await host.census()).cached_images == (IMAGE.sha256,)


async def test_a_call_may_fail_after_its_work_was_done(world: SimulatedWorld) -> None:
    host = world.host("h")
    host.faults.fail_next("ensure_image", OSError("lost answer"), after_work=True)
    with pytest.raises(OSError, match="lost answer"):
        await host.ensure_image(IMAGE)
    assert (await host.census()).cached_images == (IMAGE.sha256,)


async def test_a_call_hangs_until_it_is_released(world: SimulatedWorld) -> None:
    host = world.host("h")
    host.faults.hang_next("inventory")
    hanging = asyncio.ensure_future(host.inventory())
    await asyncio.sleep(0.02)
    assert not hanging.done()
    assert (await host.inventory()).vcpus == 64  # only the next one hangs
    host.faults.release()
    assert (await hanging).hypervisor_type == "simulated"


async def test_a_full_disk_takes_no_new_disk_but_keeps_the_old(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    host.faults.disk_full = True
    await host.ensure_disk(guest.instance_id, guest.disks[0])
    with pytest.raises(DiskFull) as caught:
        await host.ensure_disk(definition().instance_id, guest.disks[0])
    assert caught.value.message == "No space left on file system / of host h."


async def test_a_hypervisor_that_is_away_answers_nothing_and_clear_brings_it_back(world: SimulatedWorld) -> None:
    host = world.host("h")
    host.faults.down = True
    with pytest.raises(HypervisorUnavailable):
        await host.inventory()
    assert (await world.host("other").inventory()).vcpus == 64
    host.faults.clear()
    assert (await host.inventory()).vcpus == 64


async def test_a_guest_that_reboots_by_itself_is_restarted_under_another_id(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    host.faults.reboots_on_acpi = True
    outcome = await host.await_soft_reboot(guest.instance_id, was_domain_id=1, wait_s=1)
    assert (outcome.outcome, outcome.state) == ("restarted", GuestState(True, PowerState.RUNNING, 2))
    assert (await host.ensure_stopped(guest.instance_id, grace_s=0.05)).domain_id is None


async def test_things_that_happen_by_themselves_are_told(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    events: list[GuestEvent] = []
    await host.open(events.append)
    host.faults.guest_pauses(guest.instance_id)
    host.faults.guest_resumes(guest.instance_id)
    host.faults.guest_reboots(guest.instance_id)
    host.faults.guest_powers_off(guest.instance_id)
    await host.ensure_running(guest)
    host.faults.guest_dies(guest.instance_id)
    await asyncio.sleep(0)
    told = ["paused", "resumed", "shutdown", "started", "shutdown", "started", "crashed"]
    assert [event.event for event in events] == told
    assert events[-1].state == GuestState(True, PowerState.CRASHED)


async def test_a_host_restart_stops_every_guest_and_tells_nobody(world: SimulatedWorld) -> None:
    host = world.host("h")
    guests = [await started(host) for _ in range(3)]
    events: list[GuestEvent] = []
    await host.open(events.append)
    host.faults.host_restarts()
    await asyncio.sleep(0)
    census = await host.census()
    assert [census.guests[guest.instance_id].power_state for guest in guests] == [PowerState.SHUTDOWN] * 3
    assert (events, census.taps, len(census.instance_dirs)) == ([], (), 3)


# --- what it refuses -------------------------------------------------------------------------------------------------


async def test_an_image_file_must_be_there_and_be_what_it_should(world: SimulatedWorld, tmp_path: Path) -> None:
    file = tmp_path / "image file.qcow2"
    file.write_bytes(b"content")
    good = ImageSource("i", file.as_uri(), "qcow2", hashlib.sha256(b"content").hexdigest(), 7, 7)
    await world.host("h1").ensure_image(good)
    file.unlink()
    await world.host("h1").ensure_image(good)  # in its cache
    with pytest.raises(ImageGone):
        await world.host("h2").ensure_image(good)


async def test_a_guest_needs_its_ports_on_the_host(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    await host.ensure_no_ports(guest.instance_id)
    with pytest.raises(HypervisorError):
        await host.ensure_running(guest)
    assert (await host.ensure_restarted(guest, was_domain_id=None)).power_state is PowerState.RUNNING
    assert (await host.census()).networks == (NETWORK.id,)


# --- the image cache --------------------------------------------------------------------------------------------------


async def test_the_image_cache_is_bounded_and_keeps_what_was_used_last(
    world: SimulatedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instar.hypervisor.simulated.machine.CACHED_IMAGES_MAX", 2)
    host = world.host("h")
    first, second, third = (msgspec.structs.replace(IMAGE, sha256=digit * 64) for digit in "123")
    for image in (first, second, first, third):
        await host.ensure_image(image)
    assert (await host.census()).cached_images == (first.sha256, third.sha256)
