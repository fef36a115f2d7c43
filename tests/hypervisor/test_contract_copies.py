"""The contract of a hypervisor on copies: snapshots of disks, and volumes that take another one's place. Every
implementation runs it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from instar.errors import HypervisorError, ImageGone
from instar.model.guest import DiskDefinition, GuestDefinition, ImageSource, SnapshotTaken, SnapshotTarget, WorkProgress
from instar.model.states import PowerState
from instar.model.volume import VolumeDisk
from tests.fixtures.small_http_server import Asked, SmallHttpServer

from .harness import Harness
from .test_contract import MIB, definition, running


class Reports:
    """What was reported."""

    def __init__(self) -> None:
        self.told: list[WorkProgress] = []

    def __call__(self, progress: WorkProgress) -> None:
        self.told.append(progress)

    def assert_came_to_the_end(self, instance_id: str) -> None:
        percents = [progress.percent for progress in self.told]
        assert percents == sorted(percents)
        assert percents[-1] == 100
        assert {progress.instance_id for progress in self.told} == {instance_id}


def target_at(path: Path, disk_format: str = "qcow2") -> SnapshotTarget:
    return SnapshotTarget(image_id=str(uuid4()), location=path.as_uri(), format=disk_format)


async def bring_into(host: Harness, guest: GuestDefinition, state: str) -> None:
    instance_id = guest.instance_id
    if state == "paused":
        await host.hypervisor.ensure_paused(instance_id)
    elif state == "suspended":
        await host.hypervisor.ensure_suspended(instance_id)
    elif state == "stopped":
        await host.hypervisor.ensure_stopped(instance_id, grace_s=0)


def guest_of_snapshot(path: Path, taken: SnapshotTaken, disk_format: str) -> GuestDefinition:
    content = path.read_bytes()
    image = ImageSource(
        "snapshot", path.as_uri(), disk_format, hashlib.sha256(content).hexdigest(), len(content), taken.virtual_size_bytes
    )
    disk = DiskDefinition("root", taken.virtual_size_bytes, image=image)
    return GuestDefinition(str(uuid4()), "instance-of-snapshot", vcpus=1, memory_mib=32, disks=(disk,))


@pytest.mark.parametrize("state", ["stopped", "running", "paused", "suspended"])
async def test_a_snapshot_is_a_disk_of_its_own_and_the_guest_stays_as_it_is(
    host: Harness, tmp_path: Path, state: str
) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await bring_into(host, guest, state)
    before = await host.hypervisor.observe(guest.instance_id)
    path = tmp_path / "incoming image"
    disk_format = "raw" if state == "paused" else "qcow2"
    for _ in range(2):
        reports = Reports()
        target = target_at(path, disk_format)
        taken = await host.hypervisor.take_snapshot(guest.instance_id, "root", target, reports)
        reports.assert_came_to_the_end(guest.instance_id)
        assert taken.size_bytes == path.stat().st_size
        assert taken.virtual_size_bytes == 4 * MIB
    assert await host.hypervisor.observe(guest.instance_id) == before
    await host.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    await running(host, guest := guest_of_snapshot(path, taken, disk_format))
    await host.wait_until_booted(guest.instance_id, boots=2)


class ImageSink:
    """Takes what is PUT, after it was away for a moment; 404 for what is not wanted."""

    def __init__(self, path: Path) -> None:
        self._path, self._asked = path, 0
        self._server = SmallHttpServer("PUT", self._take)
        self.url, self.close = self._server.url, self._server.close

    def _take(self, asked: Asked) -> tuple[int, bytes]:
        self._asked += 1
        if self._asked == 1:
            return 503, b""
        if asked.path != "/image?signature=a":
            return 404, b""
        self._path.write_bytes(asked.body)
        return 204, b""


async def test_a_snapshot_is_sent_where_the_image_directory_cannot_be_seen(host: Harness, tmp_path: Path) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    path, sink = tmp_path / "received", ImageSink(tmp_path / "received")
    try:
        for state in ("running", "stopped"):
            await bring_into(host, guest, state)
            reports = Reports()
            target = SnapshotTarget(str(uuid4()), f"{sink.url}/image?signature=a", "qcow2")
            taken = await host.hypervisor.take_snapshot(guest.instance_id, "root", target, reports)
            reports.assert_came_to_the_end(guest.instance_id)
            assert (taken.size_bytes, taken.virtual_size_bytes) == (path.stat().st_size, 4 * MIB)
        gone = SnapshotTarget(str(uuid4()), f"{sink.url}/gone", "qcow2")
        with pytest.raises(ImageGone):
            await host.hypervisor.take_snapshot(guest.instance_id, "root", gone, Reports())
    finally:
        sink.close()
    await host.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    await running(host, guest := guest_of_snapshot(path, taken, "qcow2"))
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_a_snapshot_for_an_image_that_was_deleted_says_so(host: Harness, tmp_path: Path) -> None:
    guest = definition(host)
    state = await running(host, guest)
    target = target_at(tmp_path / "gone" / "image")
    with pytest.raises(ImageGone) as caught:
        await host.hypervisor.take_snapshot(guest.instance_id, "root", target, Reports())
    assert caught.value.image_id == target.image_id
    assert await host.hypervisor.observe(guest.instance_id) == state


async def test_a_disk_that_does_not_exist_has_no_snapshot(host: Harness, tmp_path: Path) -> None:
    guest = definition(host)
    await running(host, guest)
    with pytest.raises(HypervisorError):
        await host.hypervisor.take_snapshot(guest.instance_id, "swap", target_at(tmp_path / "image"), Reports())
    assert not (tmp_path / "image").exists()


async def test_a_running_guest_goes_over_to_another_volume(host: Harness) -> None:
    guest = definition(host)
    old = VolumeDisk(str(uuid4()), await host.volume(), "vdb")
    new = VolumeDisk(str(uuid4()), await host.volume(), "vdb")
    guest = msgspec.structs.replace(guest, volumes=(old,))
    state = await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    reports = Reports()
    await host.hypervisor.swap_volume(guest.instance_id, old.volume_id, new, reports)
    reports.assert_came_to_the_end(guest.instance_id)
    await host.hypervisor.swap_volume(guest.instance_id, old.volume_id, new, Reports())
    assert await host.hypervisor.observe(guest.instance_id) == state
    # It is the new volume that is known to be there: the old one is gone already, and may come again.
    await host.hypervisor.ensure_volume_detached(guest.instance_id, old.volume_id)
    assert len((await host.hypervisor.diagnostics(guest.instance_id)).disks) == 2
    both = msgspec.structs.replace(guest, volumes=(new, msgspec.structs.replace(old, device="vdc")))
    await host.hypervisor.ensure_volume_attached(both, new.volume_id)
    await host.hypervisor.ensure_volume_attached(both, old.volume_id)
    assert len((await host.hypervisor.diagnostics(guest.instance_id)).disks) == 3
    await host.hypervisor.ensure_volume_detached(guest.instance_id, new.volume_id)
    await host.hypervisor.ensure_volume_detached(guest.instance_id, old.volume_id)
    assert len((await host.hypervisor.diagnostics(guest.instance_id)).disks) == 1
    # One that can be shared, for another that can.
    shared, other = [VolumeDisk(str(uuid4()), await host.volume(), "vdb", shareable=True) for _ in range(2)]
    guest = msgspec.structs.replace(guest, volumes=(shared,))
    await host.hypervisor.ensure_volume_attached(guest, shared.volume_id)
    await host.hypervisor.swap_volume(guest.instance_id, shared.volume_id, other, Reports())
    await host.hypervisor.ensure_volume_detached(guest.instance_id, other.volume_id)
    assert len((await host.hypervisor.diagnostics(guest.instance_id)).disks) == 1


async def test_a_volume_that_the_guest_does_not_have_is_not_swapped(host: Harness) -> None:
    guest = definition(host)
    new = VolumeDisk(str(uuid4()), await host.volume(), "vdb")
    with pytest.raises(HypervisorError):
        await host.hypervisor.swap_volume(guest.instance_id, str(uuid4()), new, Reports())
    state = await running(host, guest)
    with pytest.raises(HypervisorError):
        await host.hypervisor.swap_volume(guest.instance_id, str(uuid4()), new, Reports())
    assert await host.hypervisor.observe(guest.instance_id) == state
    assert state.power_state == PowerState.RUNNING
