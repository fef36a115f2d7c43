"""Copies of disks on libvirt: cancelled, begun by a process that is gone, and onto a full disk. Slots for devices."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import libvirt
import msgspec
import pytest

from instar.errors import DiskFull, HypervisorError
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import DiskDefinition, GuestDefinition, SnapshotTarget
from instar.model.volume import VolumeDisk
from tests.patience import PATIENCE_S

from .libvirt_harness import LibvirtHarness
from .test_contract import MIB, definition, port, running
from .test_contract_copies import Reports, target_at

pytestmark = pytest.mark.host

LARGE = DiskDefinition("ephemeral0", 256 * MIB)


@pytest.fixture
async def host(private_daemon: PrivateDaemon, tmp_path: Path) -> AsyncIterator[LibvirtHarness]:
    opened = await LibvirtHarness.opened(private_daemon, tmp_path / "host", LibvirtSettings(pcie_root_ports=1))
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
def small_file_system(private_daemon: PrivateDaemon, tmp_path: Path) -> Iterator[Path]:
    """Eight MiB, here and (another one) in the mount namespace of libvirtd, which sees no later mounts of ours."""
    directory = tmp_path / "small"
    directory.mkdir()
    here: tuple[str, ...] = ()
    there = ("nsenter", "-m", "-t", str(private_daemon.libvirtd_pid()))
    mounted = []
    try:
        for where in (here, there):
            mount = [*where, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
            subprocess.run(mount, check=True, timeout=PATIENCE_S)
            mounted.append(where)
        yield directory
    finally:
        for where in mounted:
            subprocess.run([*where, "umount", str(directory)], check=True, timeout=PATIENCE_S)


async def with_large_disk(host: LibvirtHarness) -> GuestDefinition:
    """A running guest with a disk full of data."""
    guest = definition(host)
    guest = msgspec.structs.replace(guest, disks=(*guest.disks, LARGE))
    await host.hypervisor.ensure_disk(guest.instance_id, LARGE)
    path = host.paths.disk(guest.instance_id, LARGE.name)
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 256M", str(path)]
    await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S)
    await running(host, guest)
    return guest


def with_domain(host: LibvirtHarness, guest: GuestDefinition, act: Any) -> Any:
    connection = libvirt.open(host.daemon.uri)
    try:
        return act(connection.lookupByUUIDString(guest.instance_id))
    finally:
        connection.close()


def take(host: LibvirtHarness, guest: GuestDefinition, target: SnapshotTarget, reports: Any = None) -> asyncio.Task[Any]:
    return asyncio.ensure_future(
        host.hypervisor.take_snapshot(guest.instance_id, LARGE.name, target, reports or Reports())
    )


async def check(path: Path) -> None:
    command = ["qemu-img", "check", "-q", str(path)]
    await asyncio.to_thread(subprocess.run, command, check=True, timeout=PATIENCE_S)
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 0 256M", str(path)]
    read = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, timeout=PATIENCE_S)
    assert b"verification failed" not in read.stdout + read.stderr


async def test_a_copy_that_is_cancelled_ends_at_once_and_leaves_nothing(host: LibvirtHarness, tmp_path: Path) -> None:
    guest = await with_large_disk(host)
    target = target_at(tmp_path / "image")
    for state in ("running", "stopped"):
        if state == "stopped":
            await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
        for wait_s in (0.0, 0.02, 0.06):
            copy = take(host, guest, target)
            await asyncio.sleep(wait_s)
            copy.cancel()
            await asyncio.wait([copy], timeout=PATIENCE_S)
            assert copy.cancelled() or wait_s  # a quick machine may have come to the end
            assert copy.cancelled() != (tmp_path / "image").exists()
            if state == "running":
                stats = await asyncio.to_thread(with_domain, host, guest, lambda domain: domain.jobStats())
                assert stats["type"] == libvirt.VIR_DOMAIN_JOB_NONE
        reports = Reports()
        await take(host, guest, target, reports)
        reports.assert_came_to_the_end(guest.instance_id)
        assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600
        await check(tmp_path / "image")
        (tmp_path / "image").unlink()


async def test_a_copy_that_a_crashed_process_began_is_ended_and_begun_anew(
    host: LibvirtHarness, tmp_path: Path
) -> None:
    guest = await with_large_disk(host)
    target = target_at(tmp_path / "image")
    backup = (
        "<domainbackup mode='push'><disks><disk name='vdb' type='file'>"
        f"<target file='{tmp_path}/image'/><driver type='qcow2'/></disk></disks></domainbackup>"
    )

    def begin(domain: Any) -> None:
        for _ in range(20):  # a busy machine may copy all before it is slowed down
            domain.backupBegin(backup, None)
            with contextlib.suppress(libvirt.libvirtError):
                domain.blockJobSetSpeed("vdb", 1)
            if domain.jobStats()["type"] != libvirt.VIR_DOMAIN_JOB_NONE:
                return
            (tmp_path / "image").unlink()
        raise AssertionError("every copy was done before it could be slowed down")

    await asyncio.to_thread(with_domain, host, guest, begin)
    await take(host, guest, target)
    await check(tmp_path / "image")
    (tmp_path / "image").unlink()
    await asyncio.to_thread(with_domain, host, guest, begin)
    assert (await host.hypervisor.ensure_suspended(guest.instance_id)).domain_id is None


async def test_a_guest_that_ends_while_it_is_copied_is_copied_as_it_is_off(host: LibvirtHarness, tmp_path: Path) -> None:
    guest = await with_large_disk(host)
    copy = take(host, guest, target_at(tmp_path / "image"))
    await asyncio.sleep(0.05)
    await host.kill_guest(guest.instance_id)
    await copy
    await check(tmp_path / "image")


async def test_a_copy_onto_a_full_disk_says_so_and_leaves_nothing(
    host: LibvirtHarness, small_file_system: Path
) -> None:
    guest = await with_large_disk(host)
    for state in ("running", "stopped"):
        if state == "stopped":
            await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
        with pytest.raises(DiskFull) as caught:
            await take(host, guest, target_at(small_file_system / "image"))
        assert caught.value.filesystem == str(small_file_system)
        assert list(small_file_system.iterdir()) == []  # noqa: ASYNC240 - in a test


async def test_a_swap_that_is_cancelled_leaves_the_guest_on_its_volume(host: LibvirtHarness) -> None:
    guest = definition(host)
    old = VolumeDisk(str(uuid4()), await host.volume(size_bytes=256 * MIB), "vdb")
    new = VolumeDisk(str(uuid4()), await host.volume(size_bytes=256 * MIB), "vdb")
    with host.volume_file(old.connection).open("r+b") as file:
        file.write(b"old" * (64 * MIB))
    guest = msgspec.structs.replace(guest, volumes=(old,))
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)

    def slow_down(domain: Any) -> None:
        while not domain.blockJobInfo("vdb"):
            time.sleep(0.001)
        domain.blockJobSetSpeed("vdb", 1)

    for begun in (False, True):
        swap = asyncio.ensure_future(
            host.hypervisor.swap_volume(guest.instance_id, old.volume_id, new, Reports())
        )
        await asyncio.sleep(0)
        if begun:
            await asyncio.to_thread(with_domain, host, guest, slow_down)
        swap.cancel()
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(asyncio.CancelledError):
                await swap
    assert await asyncio.to_thread(with_domain, host, guest, lambda domain: domain.blockJobInfo("vdb")) in (None, {})
    await host.hypervisor.swap_volume(guest.instance_id, old.volume_id, new, Reports())
    await host.hypervisor.ensure_volume_detached(guest.instance_id, new.volume_id)
    assert host.volume_file(new.connection).read_bytes() == host.volume_file(old.connection).read_bytes()


async def test_a_smaller_volume_takes_no_ones_place(host: LibvirtHarness) -> None:
    guest = definition(host)
    old = VolumeDisk(str(uuid4()), await host.volume(size_bytes=4 * MIB), "vdb")
    new = VolumeDisk(str(uuid4()), await host.volume(size_bytes=2 * MIB), "vdb")
    with host.volume_file(old.connection).open("r+b") as file:
        file.write(b"old" * MIB)
    guest = msgspec.structs.replace(guest, volumes=(old,))
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    with pytest.raises(HypervisorError):
        await host.hypervisor.swap_volume(guest.instance_id, old.volume_id, new, Reports())
    await host.hypervisor.ensure_volume_detached(guest.instance_id, old.volume_id)
    assert len((await host.hypervisor.diagnostics(guest.instance_id)).disks) == 1


async def test_more_devices_than_slots_are_refused_with_the_reason(host: LibvirtHarness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    larger = msgspec.structs.replace(guest, ports=(port(host, 0), port(host, 1)))
    await host.hypervisor.ensure_ports(guest.instance_id, larger.ports)
    await host.hypervisor.ensure_port_plugged(larger, larger.ports[0].id)
    with pytest.raises(HypervisorError, match="no free slot for another device: 1 were kept free"):
        await host.hypervisor.ensure_port_plugged(larger, larger.ports[1].id)
    await host.hypervisor.ensure_port_unplugged(guest.instance_id, larger.ports[0].id)
    await host.hypervisor.ensure_port_plugged(larger, larger.ports[1].id)


async def test_a_volume_whose_server_is_away_is_refused_without_a_path(host: LibvirtHarness, tmp_path: Path) -> None:
    guest = definition(host)
    await running(host, guest)
    connection = msgspec.structs.replace(await host.volume(), socket=str(tmp_path / "none.sock"))
    volume = VolumeDisk(str(uuid4()), connection, "vdb")
    with pytest.raises(HypervisorError) as caught:
        await host.hypervisor.ensure_volume_attached(msgspec.structs.replace(guest, volumes=(volume,)), volume.volume_id)
    assert "/" not in caught.value.message
    await host.hypervisor.ensure_volume_detached(guest.instance_id, volume.volume_id)
