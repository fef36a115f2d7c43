"""Moves of libvirt guests' disks beyond the contract: shared storage, chains of layers, what a crash leaves."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from instar.errors import DiskFull, HypervisorError, StreamRefused
from instar.hypervisor.libvirt import ownership
from instar.hypervisor.libvirt.disk_offer import OTHER_FILES, chain_of, files_of
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.qcow2_header import read_header
from instar.model.guest import DiskDefinition, GuestDefinition

from .apart_daemon import ApartDaemon
from .libvirt_two_hosts import LibvirtTwoHosts, StreamHost
from .test_contract import MIB, definition, provide
from .test_contract_moves import boot, moved, nobody, off_after_one_boot, set_aside_and_offered

pytestmark = pytest.mark.host


@pytest.fixture
async def hosts(two_daemons: tuple[ApartDaemon, ApartDaemon], tmp_path: Path) -> AsyncIterator[LibvirtTwoHosts]:
    opened = await LibvirtTwoHosts.opened(two_daemons, tmp_path)
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def sharing_hosts(
    two_daemons: tuple[ApartDaemon, ApartDaemon], tmp_path: Path
) -> AsyncIterator[LibvirtTwoHosts]:
    """Both see the same instances and images, as on a file system of the network."""
    for name in ("cache", "instances"):
        (tmp_path / "first" / "state" / name).mkdir(parents=True)
        (tmp_path / "second" / "state").mkdir(parents=True, exist_ok=True)
        (tmp_path / "second" / "state" / name).symlink_to(tmp_path / "first" / "state" / name)
    opened = await LibvirtTwoHosts.opened(two_daemons, tmp_path)
    try:
        yield opened
    finally:
        await opened.close()


def root(host: StreamHost, guest: GuestDefinition) -> Path:
    return host.paths.disk(guest.instance_id, "root")


def write(path: Path, pattern: int, at: int, length: int) -> None:
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {at} {length}", str(path)]
    assert b"wrote" in subprocess.run(command, check=True, capture_output=True).stdout


def holds(path: Path, pattern: int, at: int, length: int) -> bool:
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} {at} {length}", str(path)]
    return b"Pattern verification failed" not in subprocess.run(command, check=True, capture_output=True).stdout


async def test_the_console_and_further_disks_move_along(hosts: LibvirtTwoHosts) -> None:
    guest = msgspec.structs.replace(
        definition(hosts.source),
        disks=(*definition(hosts.source).disks, DiskDefinition(name="ephemeral0", size_bytes=3 * MIB)),
    )
    await off_after_one_boot(hosts.source, guest)
    write(hosts.source.paths.disk(guest.instance_id, "ephemeral0"), 7, 1 * MIB, 65_536)
    await moved(hosts, guest)
    assert b"boots=1" in await hosts.target.hypervisor.console_output(guest.instance_id, length_bytes=1000)
    assert holds(hosts.target.paths.disk(guest.instance_id, "ephemeral0"), 7, 1 * MIB, 65_536)
    header = read_header(root(hosts.target, guest))
    assert (header.backing, header.backing_format) == (str(hosts.target.paths.cache / Path(header.backing).name), "raw")
    left = [path.name for path in root(hosts.target, guest).parent.iterdir() if path.name.startswith(".")]
    assert left == []


async def test_an_image_that_is_deleted_everywhere_else_comes_from_the_sources_cache(hosts: LibvirtTwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    image = guest.disks[0].image
    assert image is not None
    (hosts.source.directory / "tiny.raw").unlink()
    await moved(hosts, guest)
    assert (await hosts.target.hypervisor.census()).cached_images == (image.sha256,)
    await boot(hosts.target, guest, boots=2)


async def test_a_receive_that_is_cancelled_anywhere_goes_on_and_ends_whole(hosts: LibvirtTwoHosts) -> None:
    guest = definition(hosts.source)
    await provide(hosts.source, guest)
    large = DiskDefinition(name="ephemeral0", size_bytes=64 * MIB)
    await hosts.source.hypervisor.ensure_disk(guest.instance_id, large)
    for at in range(48):
        write(hosts.source.paths.disk(guest.instance_id, "ephemeral0"), at + 1, at * MIB, MIB)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.target)
    for delay_s in (0.0, 0.02, 0.05, 0.1, 0.15, 0.3):
        task = asyncio.ensure_future(hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody))
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await hosts.target.reopen()
    await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    received = hosts.target.paths.disk(guest.instance_id, "ephemeral0")
    assert all(holds(received, at + 1, at * MIB, MIB) for at in (0, 13, 47))
    await boot(hosts.target, guest, boots=1)


async def test_disks_that_an_earlier_attempt_left_are_never_taken_for_those_of_today(hosts: LibvirtTwoHosts) -> None:
    """The first move was undone while the target was away: it still has what it had received, and that is old."""
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await moved(hosts, guest)
    await hosts.source.hypervisor.ensure_brought_back(guest.instance_id)
    await boot(hosts.source, guest, boots=2)
    await hosts.source.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await moved(hosts, guest)
    await boot(hosts.target, guest, boots=3)


async def test_an_offer_is_for_one_host_and_ends_when_nothing_is_aside_any_more(hosts: LibvirtTwoHosts) -> None:
    guest = definition(hosts.source)
    await provide(hosts.source, guest)
    await hosts.source.hypervisor.ensure_set_aside(guest.instance_id)
    to_itself = await hosts.source.hypervisor.stream_address()
    offer = await hosts.source.hypervisor.offer_disks(guest.instance_id, to_itself)
    with pytest.raises(StreamRefused):
        await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    await hosts.source.hypervisor.offer_disks(guest.instance_id, await hosts.target.hypervisor.stream_address())
    await hosts.source.hypervisor.ensure_nothing_aside(guest.instance_id)
    with pytest.raises(StreamRefused):
        await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody)


async def test_an_offer_that_names_other_files_is_refused(hosts: LibvirtTwoHosts) -> None:
    guest = definition(hosts.source)
    await provide(hosts.source, guest)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.target)
    [disk] = offer.disks
    for wrong in (
        msgspec.structs.replace(offer, marker="../../etc/passwd"),
        msgspec.structs.replace(offer, other_files=("../x",)),
        msgspec.structs.replace(offer, disks=(msgspec.structs.replace(disk, name="../x"),)),
        msgspec.structs.replace(offer, disks=(msgspec.structs.replace(disk, base_sha256="../x"),)),
        msgspec.structs.replace(offer, disks=(msgspec.structs.replace(disk, below="../x"),)),
    ):
        with pytest.raises(HypervisorError):
            await hosts.target.hypervisor.receive_disks(guest.instance_id, wrong, nobody)
    assert "owner" not in OTHER_FILES


async def test_disks_for_which_there_is_no_room_are_refused_before_anything_is_sent(hosts: LibvirtTwoHosts) -> None:
    guest = definition(hosts.source)
    await provide(hosts.source, guest)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.target)
    huge = tuple(msgspec.structs.replace(disk, size_bytes=1 << 60) for disk in offer.disks)
    with pytest.raises(DiskFull):
        await hosts.target.hypervisor.receive_disks(guest.instance_id, msgspec.structs.replace(offer, disks=huge), nobody)


# --- layers -----------------------------------------------------------------------------------------------------------


async def test_resizes_on_the_same_host_keep_the_data_and_the_chain_of_layers_short(hosts: LibvirtTwoHosts) -> None:
    guest, source = definition(hosts.source), hosts.source
    await provide(source, guest)
    lengths = []
    for number in range(1, 8):
        write(root(source, guest), number, number * 65_536, 65_536)
        offer = await set_aside_and_offered(source, guest, source)
        await source.hypervisor.receive_disks(guest.instance_id, offer, nobody)
        await source.hypervisor.ensure_nothing_aside(guest.instance_id)
        files = files_of(source.paths, root(source, guest).parent)
        lengths.append(len(chain_of(files, "root")))
    assert max(lengths) == 5
    assert sorted(path.stem for path in root(source, guest).parent.glob("*.qcow2")) == sorted(f.name for f in files)
    assert all(holds(root(source, guest), number, number * 65_536, 65_536) for number in range(1, 8))
    await boot(source, guest, boots=1)


async def test_a_disk_with_layers_moves_to_another_host(hosts: LibvirtTwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.source)
    await hosts.source.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    await hosts.source.hypervisor.ensure_nothing_aside(guest.instance_id)
    await boot(hosts.source, guest, boots=2)
    await hosts.source.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await moved(hosts, guest)
    await hosts.source.hypervisor.ensure_nothing_aside(guest.instance_id)
    await boot(hosts.target, guest, boots=3)


# --- shared storage ---------------------------------------------------------------------------------------------------


async def test_on_shared_storage_nothing_is_copied_and_only_the_owner_removes(sharing_hosts: LibvirtTwoHosts) -> None:
    hosts = sharing_hosts
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    was = root(hosts.source, guest).stat().st_ino
    await moved(hosts, guest)
    layer = root(hosts.target, guest).with_name("rootbelow1.qcow2")
    assert layer.stat().st_ino == was
    await boot(hosts.target, guest, boots=2)
    source, target = await hosts.source.hypervisor.census(), await hosts.target.hypervisor.census()
    assert (source.instance_dirs, source.set_aside) == ((), (guest.instance_id,))
    assert (target.instance_dirs, target.set_aside) == ((guest.instance_id,), ())
    await hosts.source.hypervisor.ensure_nothing_aside(guest.instance_id)
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert layer.exists()
    await hosts.target.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await boot(hosts.target, guest, boots=3)


async def test_on_shared_storage_a_move_can_be_taken_back(sharing_hosts: LibvirtTwoHosts) -> None:
    hosts = sharing_hosts
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await moved(hosts, guest)
    await boot(hosts.target, guest, boots=2)
    await hosts.target.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    await hosts.source.hypervisor.ensure_brought_back(guest.instance_id)
    await hosts.target.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)  # as a late leftover is removed
    await boot(hosts.source, guest, boots=2)


async def test_an_evacuation_on_shared_storage_keeps_the_disk_also_when_it_is_undone(
    sharing_hosts: LibvirtTwoHosts,
) -> None:
    hosts = sharing_hosts
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await provide(hosts.target, guest)
    await hosts.target.hypervisor.ensure_no_disks(guest.instance_id)
    assert ownership.is_owned_by(root(hosts.source, guest).parent, "first")
    await provide(hosts.target, guest)
    await boot(hosts.target, guest, boots=2)
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    await hosts.target.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await boot(hosts.target, guest, boots=3)


# --- ownership --------------------------------------------------------------------------------------------------------


def test_a_directory_without_a_mark_is_this_hosts(tmp_path: Path) -> None:
    assert ownership.is_owned_by(tmp_path, "any")
    (tmp_path / ownership.OWNER).write_bytes(b"{damaged")
    assert ownership.is_owned_by(tmp_path, "any")
    assert HostPaths(tmp_path).aside_ids() == ()
