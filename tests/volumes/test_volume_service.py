"""The contract that the lifecycle builds on, with real exports that a real NBD client reads and writes."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from instar.errors import BadRequest, NotFound, QuotaExceeded, VolumeFailed, VolumeUnusable
from instar.nbd.monitor import MonitorError
from instar.volumes.export_process import ExportProcess, Running
from instar.volumes.local import LocalVolumes, volumes_runtime
from tests.patience import PATIENCE_S
from tests.volumes.export_client import qemu_io
from tests.volumes.volume_cloud import VolumeCloud

INSTANCE = str(uuid.uuid4())


def new_id() -> str:
    return str(uuid.uuid4())


async def made(volumes: LocalVolumes, **fields: object) -> str:
    volume_id = new_id()
    given = {"project_id": "p1", "user_id": "u1", "size_gib": 1, "name": "data", **fields}
    await volumes.create(volume_id, **given)
    assert (await volumes.until_available(volume_id, PATIENCE_S)).status == "available"
    return volume_id


async def attached(volumes: LocalVolumes, volume_id: str, instance_id: str = INSTANCE) -> tuple[str, object]:
    attachment_id = new_id()
    await volumes.reserve(attachment_id, volume_id, instance_id=instance_id)
    connection = await volumes.connect(attachment_id, host="h1", host_ip="127.0.0.1", device="/dev/vdb")
    await volumes.complete(attachment_id)
    return attachment_id, connection


async def status(volumes: LocalVolumes, volume_id: str) -> str:
    return (await volumes.volume_fetch(volume_id, project_id="p1", is_admin=False)).status


def command_line(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def mode_of(path: str) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def pid_of(cloud: VolumeCloud, volume_id: str) -> int | None:
    return ExportProcess(volumes_runtime(cloud.directory), volume_id).pid()


async def test_a_volume_goes_through_the_states_of_an_attachment(cloud: VolumeCloud) -> None:
    volumes = cloud.volumes
    volume_id, attachment_id = await made(volumes), new_id()
    seen = []
    for _ in range(2):  # every call may come twice
        await volumes.reserve(attachment_id, volume_id, instance_id=INSTANCE)
    seen.append(await status(volumes, volume_id))
    first = await volumes.connect(attachment_id, host="h1", host_ip="127.0.0.1", device="/dev/vdb")
    assert first == await volumes.connect(attachment_id, host="h1", host_ip="127.0.0.1", device="/dev/vdb")
    assert first.size_bytes == 1 << 30
    seen.append(await status(volumes, volume_id))
    await volumes.complete(attachment_id)
    await volumes.complete(attachment_id)
    seen.append(await status(volumes, volume_id))
    for detaching in (True, True, False, False, True):
        await volumes.mark_detaching(attachment_id, detaching=detaching)
        seen.append(await status(volumes, volume_id))
    await volumes.detach(attachment_id)
    await volumes.detach(attachment_id)
    seen.append(await status(volumes, volume_id))
    assert seen == [
        "reserved", "attaching", "in-use", "detaching", "detaching", "in-use", "in-use", "detaching", "available",
    ]  # fmt: skip
    assert pid_of(cloud, volume_id) is None
    await volumes.delete(volume_id)
    await volumes.delete(volume_id)
    assert cloud.files() == []


async def test_only_one_instance_has_a_volume_unless_it_is_multiattach(cloud: VolumeCloud) -> None:
    volumes = cloud.volumes
    volume_id = await made(volumes)
    await attached(volumes, volume_id)
    with pytest.raises(VolumeUnusable):
        await volumes.reserve(new_id(), volume_id, instance_id=new_id())
    second, _ = await attached(volumes, volume_id)  # the same instance, on its way to another host
    await volumes.detach(second)
    shared = await made(volumes, volume_type="multiattach")
    ends = [await attached(volumes, shared, new_id()) for _ in range(2)]
    assert pid_of(cloud, shared) is not None
    await qemu_io(ends[0][1], "write -P 7 0 64k", "flush")
    await qemu_io(ends[1][1], "read -P 7 0 64k")
    await volumes.detach(ends[0][0])
    await qemu_io(ends[1][1], "read -P 7 0 64k")
    assert await status(volumes, shared) == "in-use"
    await volumes.detach(ends[1][0])
    assert await status(volumes, shared) == "available"


async def test_what_a_guest_wrote_is_there_at_the_next_attachment(cloud: VolumeCloud) -> None:
    volumes = cloud.volumes
    volume_id = await made(volumes)
    attachment_id, connection = await attached(volumes, volume_id)
    await qemu_io(connection, "write -P 42 1M 1M")
    await volumes.detach(attachment_id, keep_reservation=True)
    assert (await status(volumes, volume_id), pid_of(cloud, volume_id)) == ("reserved", None)
    again = await volumes.connect(attachment_id, host="h2", host_ip="127.0.0.1", device="/dev/vdb")
    await qemu_io(again, "read -P 42 1M 1M")
    [one] = await volumes.attachments(INSTANCE)
    assert (one.id, one.host, one.status) == (attachment_id, "h2", "attaching")


async def test_the_export_outlives_the_cloud_and_is_adopted(cloud: VolumeCloud) -> None:
    volume_id = await made(cloud.volumes)
    attachment_id, connection = await attached(cloud.volumes, volume_id)
    pid = pid_of(cloud, volume_id)
    await cloud.stop()
    await qemu_io(connection, "write -P 3 0 1M")
    again = VolumeCloud(cloud.directory)
    await again.start()
    try:
        assert pid_of(again, volume_id) == pid
        fresh = await again.volumes.connect(attachment_id, host="h1", host_ip="", device="/dev/vdb")
        assert fresh == connection
        assert await status(again.volumes, volume_id) == "in-use"
        await again.volumes.detach(attachment_id)
        assert pid_of(again, volume_id) is None
    finally:
        await again.stop()


async def test_an_export_comes_back_after_a_restart_of_the_machine_and_strays_end(cloud: VolumeCloud) -> None:
    volume_id, free = await made(cloud.volumes), await made(cloud.volumes)
    _, connection = await attached(cloud.volumes, volume_id)
    await qemu_io(connection, "write -P 5 0 64k")
    await cloud.stop()
    runtime = volumes_runtime(cloud.directory)
    ExportProcess(runtime, volume_id).end()
    stray = ExportProcess(runtime, free)
    stray.ensure_running(cloud.volumes.owner.files.volume(free))
    again = VolumeCloud(cloud.directory)
    await again.start()
    try:
        await qemu_io(connection, "read -P 5 0 64k")
        assert stray.pid() is None
    finally:
        await again.stop()


async def test_connecting_that_is_cancelled_leaves_no_process_that_comes_later(
    cloud: VolumeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume_id, attachment_id = await made(cloud.volumes), new_id()
    await cloud.volumes.reserve(attachment_id, volume_id, instance_id=INSTANCE)
    begun, goes_on, ensure = threading.Event(), threading.Event(), ExportProcess.ensure_running

    def slowly(process: ExportProcess, file: Path, names: Mapping[str, bool] | None = None) -> Running:
        begun.set()
        goes_on.wait(PATIENCE_S)
        return ensure(process, file, names)

    monkeypatch.setattr(ExportProcess, "ensure_running", slowly)
    connecting = asyncio.create_task(
        cloud.volumes.connect(attachment_id, host="h1", host_ip="127.0.0.1", device="/dev/vdb")
    )
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    connecting.cancel()
    asyncio.get_running_loop().call_later(0.1, goes_on.set)
    await asyncio.wait([connecting])
    assert connecting.cancelled()
    assert pid_of(cloud, volume_id) is not None, "it is being started, and nobody knows of it"
    await cloud.volumes.detach(attachment_id)
    assert pid_of(cloud, volume_id) is None


async def killed(cloud: VolumeCloud, volume_id: str) -> None:
    pid = pid_of(cloud, volume_id)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def extended(cloud: VolumeCloud, volume_id: str) -> None:
    await cloud.volumes.owner.exports.resize(volume_id, 2 << 30)


@pytest.mark.parametrize("trouble", [killed, extended])
async def test_a_client_waits_while_an_export_is_restarted_or_extended(
    cloud: VolumeCloud, trouble: Callable[[VolumeCloud, str], Awaitable[None]]
) -> None:
    volume_id = await made(cloud.volumes)
    _, connection = await attached(cloud.volumes, volume_id)
    opened = f"driver=nbd,server.type=unix,server.path={connection.socket},export={connection.export},reconnect-delay=30"
    client = await asyncio.to_thread(
        subprocess.Popen,
        ["qemu-io", "--image-opts", opened],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert client.stdin is not None
    try:
        client.stdin.write(b"write -P 9 0 64k\nflush\n")
        client.stdin.flush()
        await asyncio.sleep(0.3)
        before = pid_of(cloud, volume_id)
        await trouble(cloud, volume_id)
        client.stdin.write(b"read -P 9 0 64k\nwrite -P 8 64k 64k\nread -P 8 64k 64k\nquit\n")
        client.stdin.flush()
        said, _ = await asyncio.to_thread(client.communicate, timeout=PATIENCE_S)
    finally:
        client.kill()
        client.wait()
    assert said.count(b"read 65536/65536") == 2 and b"failed" not in said, said
    assert (pid_of(cloud, volume_id) == before) is (trouble is extended)


async def test_clients_that_were_cut_off_to_extend_a_volume_are_served_again_whatever_happens(
    cloud: VolumeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume_id = await made(cloud.volumes)
    _, connection = await attached(cloud.volumes, volume_id)

    def refuse(*_: object) -> None:
        monkeypatch.undo()
        raise MonitorError(description="it does not answer in time")

    monkeypatch.setattr(ExportProcess, "_serve", refuse)
    with pytest.raises(VolumeFailed):
        await cloud.volumes.owner.exports.resize(volume_id, 2 << 30)
    opened = f"driver=nbd,server.type=unix,server.path={connection.socket},export={connection.export}"
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(_sees, opened):
            await asyncio.sleep(0.05)


def _sees(opened: str) -> bool:
    ended = subprocess.run(
        ["qemu-io", "--image-opts", opened, "-c", "read 0 64k"], capture_output=True, timeout=PATIENCE_S, check=False
    )
    return b"read 65536/65536" in ended.stdout


async def test_the_name_of_an_export_stands_on_no_command_line(cloud: VolumeCloud) -> None:
    volume_id = await made(cloud.volumes)
    _, connection = await attached(cloud.volumes, volume_id)
    pid = pid_of(cloud, volume_id)
    assert connection.export not in command_line(pid)
    assert mode_of(connection.socket) & 0o007 == 0


async def test_a_snapshot_of_an_attached_volume_is_of_one_moment(cloud: VolumeCloud) -> None:
    volumes = cloud.volumes
    volume_id, snapshot_id = await made(volumes), new_id()
    _, connection = await attached(volumes, volume_id)
    await qemu_io(connection, "write -P 1 0 4M", "flush")
    for _ in range(2):
        told = await volumes.snapshot_create(snapshot_id, volume_id, project_id="p1", user_id="u1", name="s", deadline_s=30)
        assert (told.status, told.size_gib) == ("available", 1)
    await qemu_io(connection, "write -P 2 0 4M", "flush")
    with pytest.raises(VolumeUnusable):
        await volumes.delete(volume_id)
    copy_id = await made(volumes, size_gib=2, snapshot_id=snapshot_id)
    clone_id = await made(volumes, size_gib=0, source_volume_id=volume_id)
    for made_of, pattern, gib in ((copy_id, 1, 2), (clone_id, 2, 1)):
        _, other = await attached(volumes, made_of, new_id())
        assert other.size_bytes == gib << 30
        await qemu_io(other, f"read -P {pattern} 0 4M")
    await volumes.snapshot_delete(snapshot_id)
    await volumes.snapshot_delete(snapshot_id)
    with pytest.raises(NotFound):
        await volumes.snapshot_fetch(snapshot_id, project_id="p1", is_admin=False)
    for one in await volumes.attachments():
        await volumes.detach(one.id)
    for volume in (volume_id, copy_id, clone_id):
        await volumes.delete(volume)
    assert cloud.files() == []


async def test_a_volume_that_cannot_be_is_refused_and_nothing_is_taken(cloud: VolumeCloud) -> None:
    volumes = cloud.volumes
    for wrong in ({"size_gib": 0}, {"image_id": new_id()}, {"snapshot_id": new_id()}, {"volume_type": "no such"}):
        with pytest.raises(BadRequest):
            await made(volumes, **wrong)
    with pytest.raises(QuotaExceeded):
        await made(volumes, size_gib=1001)
    with pytest.raises(NotFound):
        await volumes.until_available(new_id(), 1)
    assert cloud.files() == []


async def test_quotas_hold_when_many_ask_at_once(cloud: VolumeCloud) -> None:
    asked = [cloud.volumes.create(new_id(), project_id="p1", user_id="u", size_gib=90, name=str(n)) for n in range(20)]
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(end is None for end in ends) == 10
    assert all(isinstance(end, QuotaExceeded) for end in ends if end is not None)


async def test_a_delete_takes_over_a_volume_that_is_being_made(cloud: VolumeCloud) -> None:
    source = await made(cloud.volumes)
    volume_id = new_id()
    await cloud.volumes.create(volume_id, project_id="p1", user_id="u", size_gib=1, name="x", source_volume_id=source)
    await cloud.volumes.delete(volume_id)
    await cloud.volumes.delete(source)
    assert cloud.files() == []
    assert pid_of(cloud, source) is None
