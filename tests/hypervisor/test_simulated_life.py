"""What simulated hosts show and keep of the whole life of a guest: memory, contents of disks, images, volumes, moves."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from instar.config import SimulatedSettings
from instar.errors import DiskFull, GuestAgentMissing, HypervisorError, ImageGone, MigrationAborted, StreamBroken
from instar.hypervisor.simulated import SimulatedHypervisor, SimulatedWorld
from instar.images.inspect import inspect_image
from instar.model.guest import (
    DiskDefinition,
    DiskOffer,
    GuestDefinition,
    ImageSource,
    LiveMigrationOptions,
    SnapshotTaken,
    SnapshotTarget,
    WorkProgress,
)
from instar.model.states import PowerState
from instar.model.volume import VolumeConnection, VolumeDisk

from .test_simulated import IMAGE, definition, started

GIB = 1 << 30


@pytest.fixture
def world() -> Iterator[SimulatedWorld]:
    opened = SimulatedWorld(None, SimulatedSettings())
    yield opened
    opened.close()


def nobody(_progress: WorkProgress) -> None:
    """Reports of a call that the test does not look at."""


def volume(name: str, device: str = "vdb", boot_index: int | None = None) -> VolumeDisk:
    return VolumeDisk(name, VolumeConnection(export=name, address="10.0.0.1", port=10809), device, boot_index)


def console_boots(console: bytes) -> list[str]:
    return [line.split()[1] for line in console.decode().splitlines() if line.startswith("INSTAR-BOOT")]


# --- memory ----------------------------------------------------------------------------------------------------------


async def test_pause_and_suspend_keep_the_memory_and_a_stop_does_not(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    memory = host.faults.memory(guest.instance_id)
    paused = await host.ensure_paused(guest.instance_id)
    assert (paused.power_state, paused.domain_id) == (PowerState.PAUSED, 1)
    assert (await host.ensure_running(guest)).domain_id == 1
    for _ in range(2):
        suspended = await host.ensure_suspended(guest.instance_id)
        assert (suspended.power_state, suspended.domain_id) == (PowerState.SHUTDOWN, None)
    host.faults.host_restarts()
    assert (await host.ensure_running(guest)).power_state is PowerState.RUNNING
    assert memory == host.faults.memory(guest.instance_id) != ""
    assert console_boots(await host.console_output(guest.instance_id, length_bytes=10_000)) == ["count=1"]
    await host.ensure_suspended(guest.instance_id)
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    await host.ensure_running(guest)
    assert host.faults.memory(guest.instance_id) != memory
    await host.ensure_suspended(guest.instance_id)
    await host.ensure_restarted(guest, was_domain_id=None)
    assert host.faults.boots(guest.instance_id) == 3


async def test_a_guest_that_is_off_is_neither_paused_nor_suspended(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    with pytest.raises(HypervisorError):
        await host.ensure_paused(guest.instance_id)
    with pytest.raises(HypervisorError):
        await host.ensure_suspended(guest.instance_id)


async def test_a_full_disk_takes_no_memory_and_the_guest_runs_on(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    host.faults.disk_full = True
    with pytest.raises(DiskFull):
        await host.ensure_suspended(guest.instance_id)
    assert (await host.observe(guest.instance_id)).power_state is PowerState.RUNNING


# --- disks and images ------------------------------------------------------------------------------------------------


async def snapshot(host: SimulatedHypervisor, guest: GuestDefinition, path: Path, disk_format: str) -> SnapshotTaken:
    target = SnapshotTarget("snap", path.as_uri(), disk_format)
    return await host.take_snapshot(guest.instance_id, "root", target, nobody)


@pytest.mark.parametrize(("disk_format", "size_bytes"), [("qcow2", 20 * GIB), ("raw", 1 << 20)])
async def test_a_server_made_from_a_snapshot_has_the_data(
    world: SimulatedWorld, tmp_path: Path, disk_format: str, size_bytes: int
) -> None:
    first, second = world.host("first"), world.host("second")
    guest = msgspec.structs.replace(definition(), disks=(DiskDefinition("root", size_bytes),), ports=())
    await first.ensure_disk(guest.instance_id, guest.disks[0])
    await first.ensure_running(guest)
    first.faults.write_data(guest.instance_id, "root", "note", "before")
    path = tmp_path / "snap shot"
    taken = await snapshot(first, guest, path, disk_format)
    first.faults.write_data(guest.instance_id, "root", "note", "after")
    size = await inspect_image(path, disk_format, virtual_size_max_bytes=size_bytes, deadline_s=20)
    assert (taken.size_bytes, taken.virtual_size_bytes, size) == (path.stat().st_size, size_bytes, size_bytes)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    image = ImageSource("snap", path.as_uri(), disk_format, sha256, taken.size_bytes, size_bytes)
    copy = msgspec.structs.replace(definition(), disks=(DiskDefinition("root", 2 * size_bytes, image),), ports=())
    await second.ensure_image(image)
    await second.ensure_disk(copy.instance_id, copy.disks[0])
    await second.ensure_running(copy)
    assert second.faults.read_data(copy.instance_id) == {"note": "before"}
    assert second.faults.boots(copy.instance_id) == 2
    assert first.faults.read_data(guest.instance_id) == {"note": "after"}


async def test_a_snapshot_is_small_and_quick_whatever_the_disks_size(world: SimulatedWorld, tmp_path: Path) -> None:
    host = world.host("h")
    guest = msgspec.structs.replace(definition(), disks=(DiskDefinition("root", 500 * GIB),), ports=())
    await host.ensure_disk(guest.instance_id, guest.disks[0])
    await host.ensure_running(guest)
    began = time.process_time()
    for number in range(100):
        assert (await snapshot(host, guest, tmp_path / str(number), "qcow2")).size_bytes <= 200_000
    assert time.process_time() - began < 5  # some 0.1 s


async def test_a_snapshot_that_fails_leaves_no_file(world: SimulatedWorld, tmp_path: Path) -> None:
    host = world.host("h")
    guest = await started(host)
    host.faults.disk_full = True
    with pytest.raises(DiskFull):
        await snapshot(host, guest, tmp_path / "snap", "qcow2")
    host.faults.disk_full = False
    with pytest.raises(ImageGone):
        await snapshot(host, guest, tmp_path / "gone" / "snap", "qcow2")
    with pytest.raises(HypervisorError):
        await host.take_snapshot(guest.instance_id, "swap", SnapshotTarget("s", tmp_path.as_uri()), nobody)
    assert not (tmp_path / "snap").exists()
    assert not (tmp_path / "snap.part").exists()


@pytest.mark.parametrize(
    "content", [b"", b"QFI\xfb" + b"\xff" * 200, b"INSTAR-SIMULATED-DISK\n\xff\xff\xff\xff", b"x" * 99]
)
async def test_an_image_that_no_simulated_host_made_is_just_an_image(
    world: SimulatedWorld, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    image = ImageSource("i", path.as_uri(), "raw", hashlib.sha256(content).hexdigest(), len(content), GIB)
    guest = msgspec.structs.replace(definition(), disks=(DiskDefinition("root", GIB, image),), ports=())
    await world.host("h").ensure_image(image)
    await world.host("h").ensure_disk(guest.instance_id, guest.disks[0])
    assert world.host("h").faults.read_data(guest.instance_id) == {}


async def test_a_disk_that_is_kept_comes_back_with_its_data(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    host.faults.write_data(guest.instance_id, "root", "note", "old")
    with pytest.raises(HypervisorError):
        await host.ensure_disk_kept(guest.instance_id, "root")
    with pytest.raises(HypervisorError):
        await host.ensure_no_disk(guest.instance_id, "root")
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    for _ in range(2):
        await host.ensure_disk_kept(guest.instance_id, "root")
    await host.ensure_disk(guest.instance_id, guest.disks[0])
    await host.ensure_disk_kept(guest.instance_id, "root")  # one is kept already: the new one is left alone
    await host.ensure_running(guest)
    assert (host.faults.read_data(guest.instance_id), host.faults.boots(guest.instance_id)) == ({}, 1)
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    for _ in range(2):
        await host.ensure_disk_restored(guest.instance_id, "root")
    await host.ensure_running(guest)
    assert host.faults.read_data(guest.instance_id) == {"note": "old"}
    assert host.faults.boots(guest.instance_id) == 2


async def test_a_rescue_disk_boots_and_the_root_disk_can_be_repaired(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    rescue = DiskDefinition("rescue", GIB, IMAGE)
    await host.ensure_disk(guest.instance_id, rescue)
    await host.ensure_restarted(msgspec.structs.replace(guest, disks=(rescue, *guest.disks)), was_domain_id=None)
    assert (host.faults.boots(guest.instance_id), host.faults.boots(guest.instance_id, "rescue")) == (1, 1)
    host.faults.write_data(guest.instance_id, "root", "repaired", "yes")
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    for _ in range(2):
        await host.ensure_no_disk(guest.instance_id, "rescue")
    await host.ensure_running(guest)
    assert host.faults.boots(guest.instance_id) == 2
    assert host.faults.read_data(guest.instance_id) == {"repaired": "yes"}


async def test_disks_grow_and_never_shrink(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    for gib, free in ((3, 4093), (2, 4093)):
        await host.ensure_disk_size(guest.instance_id, DiskDefinition("root", gib * GIB, IMAGE))
        assert (await host.inventory()).free_disk_gib == free
    await host.ensure_disk_size(guest.instance_id, DiskDefinition("swap", GIB))
    assert (await host.inventory()).free_disk_gib == 4092
    host.faults.disk_full = True
    with pytest.raises(DiskFull):
        await host.ensure_disk_size(guest.instance_id, DiskDefinition("root", 4 * GIB, IMAGE))


async def test_a_guest_writes_only_so_much(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    with pytest.raises(HypervisorError):
        host.faults.write_data(guest.instance_id, "root", "big", "x" * 70_000)
    with pytest.raises(HypervisorError):
        host.faults.write_data(guest.instance_id, "nowhere", "a", "b")


# --- volumes, ports, password ----------------------------------------------------------------------------------------


async def test_what_a_guest_writes_on_a_volume_is_there_for_another_on_another_host(world: SimulatedWorld) -> None:
    first, second = world.host("first"), world.host("second")
    one = msgspec.structs.replace(await started(first), volumes=(volume("v1"),))
    for _ in range(2):
        await first.ensure_volume_attached(one, "v1")
    first.faults.write_data(one.instance_id, "v1", "note", "kept")
    for _ in range(2):
        await first.ensure_volume_detached(one.instance_id, "v1")
    with pytest.raises(HypervisorError):
        first.faults.read_data(one.instance_id, "v1")
    other = msgspec.structs.replace(await started(second), volumes=(volume("v1"),))
    await second.ensure_restarted(other, was_domain_id=1)
    assert second.faults.read_data(other.instance_id, "v1") == {"note": "kept"}
    await second.swap_volume(other.instance_id, "v1", volume("v2"), nobody)
    await second.swap_volume(other.instance_id, "v1", volume("v2"), nobody)
    assert second.faults.read_data(other.instance_id, "v2") == {"note": "kept"}
    with pytest.raises(HypervisorError):
        second.faults.read_data(other.instance_id, "v1")


async def test_a_guest_that_boots_from_a_volume_counts_there(world: SimulatedWorld) -> None:
    first, second = world.host("first"), world.host("second")
    guest = msgspec.structs.replace(definition(), disks=(), ports=(), volumes=(volume("v1", "vda", 0),))
    await first.ensure_running(guest)
    await first.ensure_absent(guest.instance_id, keep_disks=False)
    await second.ensure_running(guest)
    assert second.faults.boots(guest.instance_id, "v1") == 2


async def test_a_guest_that_does_not_let_go_keeps_its_devices(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = msgspec.structs.replace(await started(host), volumes=(volume("v1"),))
    await host.ensure_volume_attached(guest, "v1")
    host.faults.keeps_devices = True
    with pytest.raises(HypervisorError):
        await host.ensure_volume_detached(guest.instance_id, "v1")
    with pytest.raises(HypervisorError):
        await host.ensure_port_unplugged(guest.instance_id, guest.ports[0].id)
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    await host.ensure_volume_detached(guest.instance_id, "v1")
    await host.ensure_port_unplugged(guest.instance_id, guest.ports[0].id)


async def test_ports_are_plugged_and_unplugged_while_the_guest_runs(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    second = definition().ports[0]
    both = msgspec.structs.replace(guest, ports=(*guest.ports, second))
    with pytest.raises(HypervisorError):
        await host.ensure_port_plugged(both, second.id)  # its network does not know it
    await host.ensure_ports(guest.instance_id, both.ports)
    for _ in range(2):
        await host.ensure_port_plugged(both, second.id)
        assert (await host.census()).taps == tuple(sorted(port.tap_name for port in both.ports))
    assert len((await host.diagnostics(guest.instance_id)).nics) == 2
    for _ in range(2):
        await host.ensure_port_unplugged(guest.instance_id, guest.ports[0].id)
        assert (await host.census()).taps == (second.tap_name,)


async def test_a_password_is_set_where_the_guest_has_an_agent_and_is_not_kept(tmp_path: Path) -> None:
    world = SimulatedWorld(tmp_path / "log", SimulatedSettings())
    host = world.host("h")
    deaf = await started(host)
    with pytest.raises(GuestAgentMissing):
        await host.set_password(deaf.instance_id, "root", "never-to-be-kept")
    guest = msgspec.structs.replace(deaf, properties={"hw_qemu_guest_agent": "yes"})
    await host.ensure_restarted(guest, was_domain_id=1)
    await host.set_password(guest.instance_id, "root", "never-to-be-kept")
    assert host.faults.passwords_set(guest.instance_id) == 1
    world.close()
    assert b"never-to-be-kept" not in (tmp_path / "log").read_bytes()


async def test_diagnostics_are_those_of_a_running_guest(world: SimulatedWorld) -> None:
    host = world.host("h")
    guest = await started(host)
    told = await host.diagnostics(guest.instance_id)
    assert (told.driver, told.power_state, told.config_drive) == ("simulated", PowerState.RUNNING, True)
    assert (told.memory_maximum_mib, len(told.vcpu_times_ns), len(told.disks)) == (512, 1, 1)
    await host.ensure_paused(guest.instance_id)
    assert (await host.diagnostics(guest.instance_id)).power_state is PowerState.PAUSED
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    with pytest.raises(HypervisorError):
        await host.diagnostics(guest.instance_id)


# --- moves -----------------------------------------------------------------------------------------------------------


async def aside(host: SimulatedHypervisor, to: SimulatedHypervisor) -> tuple[GuestDefinition, DiskOffer]:
    guest = await started(host)
    host.faults.write_data(guest.instance_id, "root", "note", "kept")
    await host.ensure_stopped(guest.instance_id, grace_s=0)
    await host.ensure_set_aside(guest.instance_id)
    return guest, await host.offer_disks(guest.instance_id, await to.stream_address())


async def test_a_full_target_takes_no_disks(world: SimulatedWorld) -> None:
    first, second = world.host("first"), world.host("second")
    guest, offer = await aside(first, second)
    second.faults.disk_full = True
    with pytest.raises(DiskFull):
        await second.receive_disks(guest.instance_id, offer, nobody)
    assert (await second.census()).instance_dirs == ()


async def test_a_source_that_goes_away_while_disks_are_fetched_breaks_the_stream() -> None:
    world = SimulatedWorld(None, SimulatedSettings(move_s=0.04))
    first, second = world.host("first"), world.host("second")
    guest, offer = await aside(first, second)
    told: list[int] = []

    def cut(progress: WorkProgress) -> None:
        told.append(progress.percent)
        first.faults.cut_off = True

    with pytest.raises(StreamBroken):
        await second.receive_disks(guest.instance_id, offer, cut)
    assert told == [0, 25, 50, 75]
    assert (await second.census()).instance_dirs == ()


async def test_a_live_migration_takes_its_time_and_is_aborted_in_the_midst_of_it() -> None:
    world = SimulatedWorld(None, SimulatedSettings(live_s=0.1))
    first, second = world.host("first"), world.host("second")
    guest = await started(first)
    first.faults.write_data(guest.instance_id, "root", "note", "kept")
    offer = await first.offer_live(guest.instance_id, await second.stream_address())
    target = await second.ensure_ready_for_live(guest, offer)
    assert second.faults.read_data(guest.instance_id) == {}
    options = LiveMigrationOptions()
    task = asyncio.ensure_future(first.migrate_live(guest, target, options, nobody))
    await asyncio.sleep(0.03)
    first.faults.write_data(guest.instance_id, "root", "late", "too")
    await first.abort_live(guest.instance_id)
    with pytest.raises(MigrationAborted):
        await task
    began = time.process_time()
    await first.migrate_live(guest, target, options, nobody)
    assert time.perf_counter() - began >= 0.09
    assert second.faults.read_data(guest.instance_id) == {"note": "kept", "late": "too"}
    assert second.faults.memory(guest.instance_id) == "first/1"
    assert (await second.diagnostics(guest.instance_id)).uptime_s is not None


async def test_a_guest_that_dies_while_it_is_moved_stays_where_it_was() -> None:
    world = SimulatedWorld(None, SimulatedSettings(live_s=0.05))
    first, second = world.host("first"), world.host("second")
    guest = await started(first)
    target = await second.ensure_ready_for_live(
        guest, await first.offer_live(guest.instance_id, await second.stream_address())
    )
    task = asyncio.ensure_future(first.migrate_live(guest, target, LiveMigrationOptions(), nobody))
    await asyncio.sleep(0.01)
    first.faults.guest_dies(guest.instance_id)
    with pytest.raises(HypervisorError):
        await task
    assert (await first.observe(guest.instance_id)).power_state is PowerState.CRASHED
    assert not (await second.observe(guest.instance_id)).exists


# --- surviving -------------------------------------------------------------------------------------------------------


async def test_all_of_it_survives_a_restart_and_a_rewritten_log(tmp_path: Path) -> None:
    path = tmp_path / "world.log"
    world = SimulatedWorld(path, SimulatedSettings())
    first, second = world.host("first"), world.host("second")
    moved, offer = await aside(first, second)
    await second.receive_disks(moved.instance_id, offer, nobody)
    kept = await started(first)
    first.faults.write_data(kept.instance_id, "root", "note", "of kept")
    kept = msgspec.structs.replace(kept, volumes=(volume("v1"),))
    await first.ensure_volume_attached(kept, "v1")
    first.faults.write_data(kept.instance_id, "v1", "note", "of v1")
    await snapshot(first, kept, tmp_path / "snap", "qcow2")
    sha256 = hashlib.sha256((tmp_path / "snap").read_bytes()).hexdigest()
    image = ImageSource("snap", (tmp_path / "snap").as_uri(), "qcow2", sha256, 1, GIB)
    await second.ensure_image(image)
    await first.ensure_suspended(kept.instance_id)
    memory = first.faults.memory(kept.instance_id)
    (tmp_path / "snap").unlink()
    for _ in range(3):  # the second opening reads what the first has rewritten
        world.close()
        world = SimulatedWorld(path, SimulatedSettings())
    first, second = world.host("first"), world.host("second")
    assert world.host_names() == ("first", "second")
    assert (await first.census()).set_aside == (moved.instance_id,)
    assert second.faults.read_data(moved.instance_id) == {"note": "kept"}
    await first.ensure_brought_back(moved.instance_id)
    assert first.faults.read_data(moved.instance_id) == {"note": "kept"}
    await first.ensure_ports(kept.instance_id, kept.ports)
    assert (await first.ensure_running(kept)).power_state is PowerState.RUNNING
    assert first.faults.memory(kept.instance_id) == memory
    assert first.faults.read_data(kept.instance_id, "v1") == {"note": "of v1"}
    await second.ensure_disk(kept.instance_id, DiskDefinition("root", GIB, image))
    assert second.faults.read_data(kept.instance_id) == {"note": "of kept"}
    world.close()


OLD_ID, OLD_PORT = "7d2a4b1e-0000-4000-8000-000000000001", "7d2a4b1e-0000-4000-8000-000000000002"
OLD_PLUGGED = [OLD_PORT, "network", "tap7d2a4b1e-00", "fa:16:3e:00:00:01", ["10.0.0.9/24"]]
# As the first version wrote them: tag, then the fields that there were.
OLD_RECORDS: list[list[object]] = [
    [0, "h", 6],
    [7, "h", "0" * 64],
    [3, "h", OLD_ID, "root", GIB],
    [6, "h", OLD_ID, [OLD_PLUGGED]],
    [1, "h", [OLD_ID, "instance-1", 1, 512, "web-1", [OLD_PLUGGED], 1, 7]],
    [4, "h", OLD_ID, b"INSTAR-BOOT count=2 uuid=x hostname=web-1\n", 2],
    [3, "h", OLD_PORT, "root", GIB],
    [5, "h", OLD_PORT],
]


async def test_a_log_of_the_first_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "world.log"
    bodies = [msgspec.msgpack.encode(record) for record in OLD_RECORDS]
    path.write_bytes(b"".join(struct.pack("<II", len(body), zlib.crc32(body)) + body for body in bodies))
    for _ in range(2):
        world = SimulatedWorld(path, SimulatedSettings())
        host = world.host("h")
        state = await host.observe(OLD_ID)
        assert (state.power_state, state.domain_id) == (PowerState.RUNNING, 7)
        census = await host.census()
        assert (census.instance_dirs, census.taps, census.set_aside) == ((OLD_ID,), ("tap7d2a4b1e-00",), ())
        assert host.faults.boots(OLD_ID) == 2
        world.close()
    world = SimulatedWorld(path, SimulatedSettings())
    host = world.host("h")
    await host.ensure_suspended(OLD_ID)
    guest = msgspec.structs.replace(definition(), instance_id=OLD_ID, ports=())
    assert (await host.ensure_running(guest)).domain_id == 8
    assert (await host.ensure_restarted(guest, was_domain_id=8)).domain_id == 9
    assert host.faults.boots(OLD_ID) == 3
    world.close()


CHILD = """
import asyncio, sys
from pathlib import Path
from instar.config import SimulatedSettings
from instar.hypervisor.simulated import SimulatedWorld
from instar.model.guest import LiveMigrationOptions
from tests.hypervisor.test_simulated import started

async def main():
    world = SimulatedWorld(Path(sys.argv[1]), SimulatedSettings())
    hosts = [world.host("a"), world.host("b")]
    guests = [await started(hosts[0]) for _ in range(5)]
    for guest in guests:
        hosts[0].faults.write_data(guest.instance_id, "root", "data", "x" * 30_000)
        print(guest.instance_id, flush=True)
    turn = 0
    while True:
        here, there = hosts[turn % 2], hosts[(turn + 1) % 2]
        for guest in guests:
            offer = await here.offer_live(guest.instance_id, await there.stream_address())
            target = await there.ensure_ready_for_live(guest, offer)
            await here.migrate_live(guest, target, LiveMigrationOptions(), lambda progress: None)
            await here.ensure_absent(guest.instance_id, keep_disks=False)
            print("moved", flush=True)
        turn += 1

asyncio.run(main())
"""


def ids_until_killed(path: Path) -> list[str]:
    """Run the child until guests have moved to and fro for a while, and kill it in the midst of it."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(305)]
        child.kill()
        child.stdout.read()
    assert child.returncode == -signal.SIGKILL
    return [line.strip() for line in lines[:5]]


async def test_a_guest_that_moves_while_the_process_is_killed_runs_on_one_host_with_its_data(tmp_path: Path) -> None:
    path = tmp_path / "world.log"
    ids = await asyncio.to_thread(ids_until_killed, path)
    world = SimulatedWorld(path, SimulatedSettings())
    hosts = [world.host("a"), world.host("b")]
    for instance_id in ids:
        states = [await host.observe(instance_id) for host in hosts]
        [runs_on] = [host for host, state in zip(hosts, states, strict=True) if state.domain_id is not None]
        assert runs_on.faults.read_data(instance_id) == {"data": "x" * 30_000}
        assert (runs_on.faults.boots(instance_id), runs_on.faults.memory(instance_id)[0]) == (1, "a")
    world.close()
