"""Images that operations make of instances: queued, written by a host, finished or discarded; each twice, and killed."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from image_cloud import ImageCloud
from killed_snapshot import POINTS

from instar.config import ImageSettings
from instar.errors import BadRequest, Conflict, HypervisorError, ImageGone, ImageUnusable, TooLarge, UnsupportedMedia
from instar.images import blobs
from instar.images.contract import ImageDraft
from tests.patience import PATIENCE_S

PROGRAM = Path(__file__).parent / "killed_snapshot.py"
UNFINISHED = ("queued", "writing", "written", "inspected")  # points at which the image is not active yet
INSTANCE = "11111111-0000-4000-8000-000000000001"


def draft(**more: str) -> ImageDraft:
    properties = {"instance_uuid": INSTANCE, "image_type": "snapshot", "base_image_ref": "b"} | more
    return ImageDraft("snap", "p1", properties, min_disk_gib=1, min_ram_mib=64)


def host_path(url: str) -> Path:
    assert url.startswith("file:///")
    return Path(url.removeprefix("file://"))


async def begun(cloud: ImageCloud, **more: str) -> tuple[str, Path]:
    """A queued image, and where the host writes it."""
    image_id = str(uuid.uuid4())
    await cloud.images.queue(image_id, draft(**more))
    return image_id, host_path(await cloud.images.upload_target(image_id))


async def test_image_of_an_instance_is_shown_to_its_owner_at_every_step(cloud, member, other, qemu_img):
    data = qemu_img("disk.qcow2", "3M", "-f", "qcow2")
    image_id = str(uuid.uuid4())
    await cloud.images.queue(image_id, draft())
    shown = await member.show(image_id)
    assert (shown["status"], shown["size"], shown["visibility"]) == ("queued", None, "private")
    assert (shown["min_disk"], shown["min_ram"], shown["owner"]) == (1, 64, "p1")
    assert (shown["instance_uuid"], shown["image_type"], shown["base_image_ref"]) == (INSTANCE, "snapshot", "b")
    target = host_path(await cloud.images.upload_target(image_id))
    assert (await member.show(image_id))["status"] == "saving"
    await member.call("GET", f"/v2/images/{image_id}/file", 204)
    await member.upload(image_id, b"mine", expect=409)
    shutil.copyfile(data, target)
    inode = target.stat().st_ino
    image = await cloud.images.finish_upload(image_id)
    assert (image.status, image.virtual_size_bytes, image.size_bytes) == ("active", 3 << 20, data.stat().st_size)
    shown, content = await member.show(image_id), data.read_bytes()
    assert shown["status"] == "active"
    await assert_checksums(member, image_id, content)
    [stored] = cloud.files()
    assert stored == hashlib.sha256(content).hexdigest()
    assert (cloud.directory / "images" / stored).stat().st_ino == inode, "the data was copied"
    assert (await member.call("GET", f"/v2/images/{image_id}/file", 200)).content == content
    await other.call("GET", f"/v2/images/{image_id}", 404)


async def assert_checksums(member, image_id: str, content: bytes) -> None:
    """They come by themselves, some time after the image is active."""
    async with asyncio.timeout(PATIENCE_S):
        while (shown := await member.show(image_id))["os_hash_value"] is None:
            assert (shown["status"], shown["checksum"], shown["os_hash_algo"]) == ("active", None, None)
            await asyncio.sleep(0.01)
    assert shown["checksum"] == hashlib.md5(content, usedforsecurity=False).hexdigest()
    assert (shown["os_hash_algo"], shown["os_hash_value"]) == ("sha512", hashlib.sha512(content).hexdigest())


async def test_checksums_that_a_killed_process_did_not_get_to_are_computed_at_the_next_start(
    cloud, member, qemu_img
):
    data = qemu_img("disk.qcow2", "2M", "-f", "qcow2")
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    await cloud.images._checksums.close()
    await cloud.images.finish_upload(image_id)
    shown = await member.show(image_id)
    assert (shown["status"], shown["checksum"], shown["os_hash_value"]) == ("active", None, None)
    answer = await member.call("GET", f"/v2/images/{image_id}/file", 200)
    assert answer.content == data.read_bytes()
    assert "content-md5" not in answer.headers
    cloud.images._checksums.open()
    await assert_checksums(member, image_id, data.read_bytes())


async def test_checksums_of_an_image_that_is_deleted_are_given_up_though_a_cache_has_its_data(
    cloud, qemu_img, monkeypatch, tmp_path
):
    """A host on this machine keeps what it has fetched under a name of its own: the file is read on for nobody."""
    data = qemu_img("disk.qcow2", "2M", "-f", "qcow2")
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    await cloud.images._checksums.close()
    await cloud.images.finish_upload(image_id)
    [sha256] = cloud.files()
    blobs = cloud.images._checksums._blobs
    (tmp_path / "cached").hardlink_to(blobs.path(sha256))
    pieces = []

    async def piece(*_given):
        pieces.append("read")
        await cloud.images.discard(image_id)
        return True

    monkeypatch.setattr(blobs, "_hash", piece)
    with pytest.raises(FileNotFoundError):
        async with asyncio.timeout(PATIENCE_S):
            await blobs.checksums(sha256)
    assert pieces == ["read"]


async def test_each_step_may_come_twice(cloud, qemu_img):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    image_id, target = await begun(cloud)
    await cloud.images.queue(image_id, draft())
    assert host_path(await cloud.images.upload_target(image_id)) == target
    shutil.copyfile(data, target)
    first = await cloud.images.finish_upload(image_id)
    assert await cloud.images.finish_upload(image_id) == first
    await cloud.images.queue(image_id, draft())
    assert (await cloud.images.finish_upload(image_id)).status == "active"
    for _ in range(2):
        await cloud.images.discard(image_id)
    assert cloud.files() == []
    await cloud.images.discard(str(uuid.uuid4()))


async def test_two_calls_at_once_finish_one_image(cloud, qemu_img):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    first, second = await asyncio.gather(*(cloud.images.finish_upload(image_id) for _ in range(2)))
    assert first == second
    await cloud.images.image_source(image_id)
    assert len(cloud.files()) == 1


async def test_cancelled_finish_leaves_nothing_behind_after_discard(cloud, qemu_img):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    for delay_s in (0, 0.005, 0.02, 0.05):
        image_id, target = await begun(cloud)
        shutil.copyfile(data, target)
        finish = asyncio.create_task(cloud.images.finish_upload(image_id))
        await asyncio.sleep(delay_s)
        finish.cancel()
        await asyncio.gather(finish, return_exceptions=True)
        await cloud.images.discard(image_id)
        assert cloud.files() == []


async def test_same_content_as_another_image_is_stored_once(cloud, member, qemu_img):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    uploaded = await member.add(data=data.read_bytes(), disk_format="qcow2")
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    await cloud.images.finish_upload(image_id)
    await cloud.images.image_source(image_id)  # waits for what tells that they are the same
    assert len(cloud.files()) == 1
    await cloud.images.discard(image_id)
    assert (await member.call("GET", f"/v2/images/{uploaded['id']}/file", 200)).content == data.read_bytes()


@pytest.mark.parametrize("when", ["queued", "saving", "written", "active"])
async def test_owner_deletes_the_image_meanwhile(cloud, member, qemu_img, when):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    image_id = str(uuid.uuid4())
    await cloud.images.queue(image_id, draft())
    if when != "queued":
        target = host_path(await cloud.images.upload_target(image_id))
        part = target.with_name(target.name + ".part")
        part.write_bytes(b"half")
    if when in ("written", "active"):
        shutil.copyfile(data, part)
        part.rename(target)
    if when == "active":
        await cloud.images.finish_upload(image_id)
    await member.call("DELETE", f"/v2/images/{image_id}", 204)
    assert cloud.files() == []
    await cloud.images.queue(image_id, draft())  # the step again, after a crash: it does not bring the image back
    with pytest.raises(ImageGone):
        await cloud.images.upload_target(image_id)
    if when == "saving":
        shutil.copyfile(data, target)  # a host that has not heard of it
    with pytest.raises(ImageGone):
        await cloud.images.finish_upload(image_id)
    await cloud.images.discard(image_id)
    assert cloud.files() == []
    assert await cloud.images.unfinished() == {}


async def test_owner_deletes_the_image_while_it_is_hashed(cloud, member, qemu_img):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    finish = asyncio.create_task(cloud.images.finish_upload(image_id))
    await asyncio.sleep(0)
    await member.call("DELETE", f"/v2/images/{image_id}", 204)
    with pytest.raises(ImageGone):
        await finish
    assert cloud.files() == []


async def test_data_without_a_name_is_read_and_whoever_needs_its_hash_waits(cloud, member, qemu_img, monkeypatch):
    data, may_hash = qemu_img("disk.qcow2", "1M", "-f", "qcow2"), asyncio.Event()
    hashed = cloud.images.blobs.hashed

    async def slow(name: str):
        await may_hash.wait()
        return await hashed(name)

    monkeypatch.setattr(cloud.images.blobs, "hashed", slow)
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    assert (await cloud.images.finish_upload(image_id)).status == "active"
    await cloud.images.sweep()
    assert cloud.files() == [f"incoming/{image_id}"]
    assert (await member.call("GET", f"/v2/images/{image_id}/file", 200)).content == data.read_bytes()
    waiting = asyncio.create_task(cloud.images.image_source(image_id))
    given_up = asyncio.create_task(cloud.images.image_source(image_id))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    given_up.cancel()
    may_hash.set()
    source, content = await waiting, data.read_bytes()
    assert (source.sha256, source.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert cloud.files() == [source.sha256]


@pytest.mark.parametrize("stage", ["hashed", "place"])
async def test_owner_deletes_the_image_before_its_data_has_a_name(cloud, member, qemu_img, monkeypatch, stage):
    data, reached, go_on = qemu_img("disk.qcow2", "1M", "-f", "qcow2"), asyncio.Event(), asyncio.Event()
    real = getattr(cloud.images.blobs, stage)

    async def held(*given):
        found = await real(*given)
        reached.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(cloud.images.blobs, stage, held)
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    await cloud.images.finish_upload(image_id)
    await reached.wait()
    deleting = asyncio.create_task(member.call("DELETE", f"/v2/images/{image_id}", 204))
    async with asyncio.timeout(PATIENCE_S):
        while (await member.call("GET", "/v2/images", 200)).json()["images"]:
            await asyncio.sleep(0.01)
    go_on.set()
    await deleting
    assert cloud.files() == []
    with pytest.raises(ImageGone):
        await cloud.images.image_source(image_id)


async def test_image_is_not_finished_while_the_host_writes(cloud, qemu_img, monkeypatch):
    monkeypatch.setattr(blobs, "_WRITER_ENDS_S", 0.05)
    image_id, target = await begun(cloud)
    shutil.copyfile(qemu_img("disk.qcow2", "1M", "-f", "qcow2"), target)
    with target.open("r+b"), pytest.raises(HypervisorError, match="still written to"):
        await cloud.images.finish_upload(image_id)
    assert (await cloud.images.finish_upload(image_id)).status == "active"


async def test_image_is_active_when_its_data_is_on_the_disk_and_is_read_meanwhile(cloud, member, qemu_img, monkeypatch):
    hashed, synced, read, on_disk = cloud.images.blobs.hashed, cloud.images.blobs.synced, asyncio.Event(), asyncio.Event()

    async def telling(name: str):
        found = await hashed(name)
        read.set()
        return found

    async def slow(name: str) -> None:
        await on_disk.wait()
        await synced(name)

    monkeypatch.setattr(cloud.images.blobs, "hashed", telling)
    monkeypatch.setattr(cloud.images.blobs, "synced", slow)
    image_id, target = await begun(cloud)
    shutil.copyfile(qemu_img("disk.qcow2", "1M", "-f", "qcow2"), target)
    finishing = asyncio.ensure_future(cloud.images.finish_upload(image_id))
    async with asyncio.timeout(60):
        await read.wait()
    assert (await member.show(image_id))["status"] == "saving"
    on_disk.set()
    assert (await finishing).status == "active"


async def test_data_that_was_replaced_after_it_was_read_is_read_again(cloud, qemu_img, monkeypatch):
    """As by a host that sends the same image a second time."""
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2").read_bytes()
    other = bytearray(data)
    other[0x20000 + 100] = 1  # a cluster that is counted although it is not there
    hashed, read = cloud.images.blobs.hashed, asyncio.Event()

    async def telling(name: str):
        found = await hashed(name)
        read.set()
        return found

    async def replacing(name: str) -> None:
        await read.wait()
        again = cloud.images.blobs.incoming(f"{name}.again")
        again.write_bytes(other)
        again.rename(cloud.images.blobs.incoming(name))

    monkeypatch.setattr(cloud.images.blobs, "hashed", telling)
    monkeypatch.setattr(cloud.images.blobs, "synced", replacing)
    image_id, target = await begun(cloud)
    target.write_bytes(data)
    await cloud.images.finish_upload(image_id)
    assert (await cloud.images.image_source(image_id)).sha256 == hashlib.sha256(other).hexdigest()


async def test_discard_takes_a_protected_image_too(cloud, member, qemu_img):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    image_id, target = await begun(cloud)
    shutil.copyfile(data, target)
    await cloud.images.finish_upload(image_id)
    await member.patch(image_id, {"op": "replace", "path": "/protected", "value": True})
    await member.call("DELETE", f"/v2/images/{image_id}", 403)
    await cloud.images.discard(image_id)
    await member.call("GET", f"/v2/images/{image_id}", 404)


async def test_data_that_no_upload_could_have_is_refused(cloud, qemu_img):
    base = qemu_img("base.qcow2", "1M", "-f", "qcow2")
    overlay = qemu_img("overlay.qcow2", "1M", "-f", "qcow2", "-b", base.name, "-F", "qcow2")
    image_id, target = await begun(cloud)
    shutil.copyfile(overlay, target)
    with pytest.raises(ImageUnusable, match="backing file"):
        await cloud.images.finish_upload(image_id)
    target.unlink()
    target.write_bytes(b"raw" * 1000)
    with pytest.raises(UnsupportedMedia):
        await cloud.images.finish_upload(image_id)
    target.unlink()
    target.symlink_to(base)
    with pytest.raises(HypervisorError, match="no data"):
        await cloud.images.finish_upload(image_id)
    target.unlink()
    with pytest.raises(HypervisorError, match="no data"):
        await cloud.images.finish_upload(image_id)
    shutil.copyfile(base, target)  # another try
    assert (await cloud.images.finish_upload(image_id)).status == "active"


class TestSmallStore:
    @pytest.fixture
    def settings(self) -> ImageSettings:
        return ImageSettings(size_max_bytes=100_000)

    async def test_image_larger_than_allowed_is_refused(self, cloud, qemu_img):
        image_id, target = await begun(cloud)
        shutil.copyfile(qemu_img("disk.qcow2", "1M", "-f", "qcow2"), target)
        with pytest.raises(TooLarge):
            await cloud.images.finish_upload(image_id)
        await cloud.images.discard(image_id)
        assert cloud.files() == []


async def test_only_what_is_free_is_queued(cloud, member):
    theirs = await member.create()
    with pytest.raises(Conflict):
        await cloud.images.queue(theirs["id"], draft())
    for properties in ({"status": "active"}, {"owner": "p2"}, {"locations": "x"}):
        with pytest.raises(BadRequest):
            await cloud.images.queue(str(uuid.uuid4()), draft(**properties))
    with pytest.raises(BadRequest):
        await cloud.images.queue(str(uuid.uuid4()), ImageDraft("x" * 256, "p1", {}))


async def test_client_that_uploads_to_a_queued_snapshot_makes_it_fail(cloud, member):
    image_id = str(uuid.uuid4())
    await cloud.images.queue(image_id, draft())
    await member.patch(image_id, {"op": "replace", "path": "/disk_format", "value": "raw"})
    await member.upload(image_id, b"mine")
    with pytest.raises(Conflict):
        await cloud.images.upload_target(image_id)


async def test_backups_are_listed_by_type_newest_first_and_only_real_ones(cloud, member, qemu_img):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    made = []
    for kind in ("daily", "weekly", "daily"):
        image_id, target = await begun(cloud, image_type="backup", backup_type=kind)
        shutil.copyfile(data, target)
        await cloud.images.finish_upload(image_id)
        made.append(image_id)
    await begun(cloud, image_type="backup", backup_type="daily")  # not active yet
    # Anybody may write such properties: they must not push the real ones out of a rotation.
    await member.add(instance_uuid=INSTANCE, image_type="backup", backup_type="daily")
    assert await cloud.images.backups_of(INSTANCE, "daily") == [made[2], made[0]]
    assert await cloud.images.backups_of(INSTANCE, "weekly") == [made[1]]
    assert await cloud.images.backups_of("another", "daily") == []


async def test_unfinished_are_those_of_instances_without_data(cloud, member, qemu_img):
    await member.create(instance_uuid=INSTANCE)  # a user's own
    queued = str(uuid.uuid4())
    await cloud.images.queue(queued, draft())
    saving, target = await begun(cloud)
    assert await cloud.images.unfinished() == {queued: INSTANCE, saving: INSTANCE}
    shutil.copyfile(qemu_img("disk.qcow2", "1M", "-f", "qcow2"), target)
    await cloud.images.finish_upload(saving)
    await cloud.images.discard(queued)
    assert await cloud.images.unfinished() == {}


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_any_point_the_image_can_be_finished_or_discarded(tmp_path, qemu_img, point):
    data = qemu_img("disk.qcow2", "1M", "-f", "qcow2")
    kept, lost = str(uuid.uuid4()), str(uuid.uuid4())
    directory = tmp_path / "cloud"
    directory.mkdir()
    for image_id in (lost, kept):
        ended = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, str(PROGRAM), str(directory), image_id, str(data), point],
            check=False,
            timeout=60,
        )
        assert ended.returncode == -signal.SIGKILL
    cloud = ImageCloud(directory)
    await cloud.start()
    try:
        assert set(await cloud.images.unfinished()) == ({kept, lost} if point in UNFINISHED else set())
        if point in ("written", "inspected"):
            assert kept in [Path(name).name for name in cloud.files()], "the data of a snapshot in flight was swept"
        assert any(name.endswith(".part") for name in cloud.files()) == (point == "writing"), "a host may be writing it"
        await cloud.images.queue(kept, draft(instance_uuid="i-1"))
        if point in ("queued", "writing"):
            shutil.copyfile(data, host_path(await cloud.images.upload_target(kept)))
        assert (await cloud.images.finish_upload(kept)).status == "active"
        source = await cloud.images.image_source(kept)
        await cloud.images.discard(lost)
        assert source.location == (directory / "images" / source.sha256).as_uri()
        assert cloud.files() == [hashlib.sha256(data.read_bytes()).hexdigest()]
    finally:
        await cloud.stop()
