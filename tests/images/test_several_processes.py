"""Two processes over one database and one image directory: neither takes the other's uploads for those of the dead."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from instar.config import ImageSettings
from instar.errors import Conflict, NotFound
from instar.images import storing
from instar.images.contract import ImageDraft
from instar.images.fields import Caller
from instar.images.local import LocalImages
from instar.store.sqlite import SqliteStore
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
MINE = Caller("p1", is_admin=False)
FIELDS = {"name": "n", "disk_format": "raw", "container_format": "bare"}


class Process:
    """What one process has of the image service: a store and an image service of its own, the same database and files."""

    def __init__(self, directory: Path, settings: ImageSettings) -> None:
        self.store = SqliteStore(directory / "instar.db", durable=False)
        self.images = LocalImages(self.store, directory, settings)

    async def __aenter__(self) -> Process:
        await self.store.open()
        await self.images.open()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.images.close()
        await self.store.close()

    async def uploaded(self, content: bytes) -> str:
        image = await self.images.create(FIELDS, MINE)
        await self.images.upload(image.id, _chunks(content), MINE)
        return image.id

    async def read(self, image_id: str) -> bytes:
        download = await self.images.open_data(image_id, MINE)
        assert download is not None
        return b"".join([part async for part in self.images.blobs.stream(download.file, 0, download.size_bytes)])


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    yield content


@pytest.fixture
def settings(tmp_path: Path) -> ImageSettings:
    return ImageSettings(directory=str(tmp_path / "shared"))


@pytest.fixture
async def two(tmp_path: Path, settings: ImageSettings) -> AsyncIterator[tuple[Process, Process]]:
    async with Process(tmp_path, settings) as one, Process(tmp_path, settings) as other:
        yield one, other


class Slow:
    """An upload that goes on when it is told."""

    def __init__(self) -> None:
        self.sent, self.go_on = asyncio.Event(), asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        yield b"first "
        self.sent.set()
        await self.go_on.wait()
        yield b"second"


async def test_start_and_sweep_of_a_process_leave_the_uploads_of_another_alone(two, tmp_path, settings):
    one, other = two
    image, slow = await one.images.create(FIELDS, MINE), Slow()
    upload = asyncio.create_task(one.images.upload(image.id, slow.chunks(), MINE))
    await slow.sent.wait()
    await other.images.sweep()
    async with Process(tmp_path, settings) as third:
        assert (await third.images.fetch(image.id, MINE)).status == "saving"
        with pytest.raises(Conflict):
            await third.images.upload(image.id, _chunks(b"mine"), MINE)
    slow.go_on.set()
    await upload
    assert await other.read(image.id) == b"first second"


async def test_sweep_between_the_final_name_and_its_row_keeps_the_data(two, monkeypatch):
    one, other = two
    finish, placed, go_on = storing.image_upload_finish, asyncio.Event(), asyncio.Event()

    async def late(*given: Any, **more: Any) -> None:
        placed.set()
        await go_on.wait()
        await finish(*given, **more)

    monkeypatch.setattr(storing, "image_upload_finish", late)
    upload = asyncio.create_task(one.uploaded(b"data"))
    await placed.wait()
    sweep = asyncio.create_task(other.images.sweep())
    await asyncio.sleep(0.05)
    assert not sweep.done(), "it waits for the lock of that content"
    go_on.set()
    image_id = await upload
    await sweep
    assert await other.read(image_id) == b"data"


async def test_upload_of_a_killed_process_is_queued_again_while_another_goes_on(two, tmp_path, settings):
    one, _ = two
    image = await one.images.create(FIELDS, MINE)
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, str(tmp_path), settings.directory, image.id, stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert process.stdout is not None
            while (line := await process.stdout.readline()).strip() != b"sent":
                assert line, "it ended"
        await one.images.sweep()
        assert (await one.images.fetch(image.id, MINE)).status == "saving"
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()
    await one.images.sweep()
    assert (await one.images.fetch(image.id, MINE)).status == "queued"
    assert list((Path(settings.directory) / "incoming").iterdir()) == []
    await one.images.upload(image.id, _chunks(b"again"), MINE)


async def test_same_content_uploaded_and_deleted_by_both_at_once_is_there_as_long_as_a_row_says_so(two):
    one, other = two

    async def busy(process: Process) -> None:
        for _ in range(15):
            image_id = await process.uploaded(b"the same")
            assert await process.read(image_id) == b"the same"
            await process.images.delete(image_id, MINE)

    kept = await one.uploaded(b"the same")
    await asyncio.gather(busy(one), busy(other), busy(one), busy(other))
    assert await other.read(kept) == b"the same"
    await other.images.delete(kept, MINE)
    with pytest.raises(NotFound):
        await one.read(kept)
    assert not (other.images.blobs.path(hashlib.sha256(b"the same").hexdigest())).exists()


async def test_download_goes_on_when_another_process_deletes_the_image(two):
    one, other = two
    content = os.urandom(3 << 20)
    image_id = await one.uploaded(content)
    download = await one.images.open_data(image_id, MINE)
    assert download is not None
    stream = one.images.blobs.stream(download.file, 0, download.size_bytes)
    read = await anext(stream)
    await other.images.delete(image_id, MINE)
    read += b"".join([part async for part in stream])
    assert read == content


async def test_snapshot_that_a_host_writes_belongs_to_no_process(two, tmp_path, settings, qemu_img):
    one, other = two
    image_id = str(uuid.uuid4())
    await one.images.queue(image_id, ImageDraft("snap", "p1", {"instance_uuid": "i-1", "image_type": "snapshot"}))
    target = Path((await one.images.upload_target(image_id)).removeprefix("file://"))
    assert target.parent == Path(settings.directory) / "incoming"
    part = target.with_name(target.name + ".part")
    part.write_bytes(qemu_img("disk.qcow2", "1M", "-f", "qcow2").read_bytes())
    await other.images.sweep()
    part.rename(target)
    async with Process(tmp_path, settings) as third:
        assert (await third.images.finish_upload(image_id)).status == "active"
    await one.images.sweep()  # what the third did not get to is found on the timer of the others
    async with asyncio.timeout(PATIENCE_S):
        while (await one.images.fetch(image_id, MINE)).sha512 is None:
            await asyncio.sleep(0.02)


async def test_image_that_two_processes_register_at_once_is_one(two, tmp_path):
    file = tmp_path / "tiny.raw"
    file.write_bytes(b"tiny")
    made = await asyncio.gather(
        *(one.images.register("tiny", file, disk_format="raw", properties={}) for one in (*two, *two))
    )
    assert len({record.id for record in made}) == 1


async def _upload_for_ever(directory: Path, shared: str, image_id: str) -> None:
    async with Process(directory, ImageSettings(directory=shared)) as one:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"half"
            print("sent", flush=True)
            await asyncio.Event().wait()

        await one.images.upload(image_id, chunks(), MINE)


if __name__ == "__main__":
    asyncio.run(_upload_for_ever(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
