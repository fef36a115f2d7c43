"""Hosts that do not see the image directory: they fetch and send images by signed URLs of an API in another process."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from image_cloud import ImageCloud

from instar.config import ImageSettings, LibvirtSettings
from instar.errors import HypervisorError, ImageGone, StartupError
from instar.http.server import HttpServer
from instar.hypervisor import image_transfer
from instar.hypervisor.image_transfer import fetched, send
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.images.contract import ImageDraft
from instar.images.fields import Caller
from instar.images.local import LocalImages
from instar.model.guest import ImageSource
from instar.store.sqlite import SqliteStore
from tests.patience import PATIENCE_S

MINE = Caller("p1", is_admin=False)


class Api:
    """An API process on a port of its own, to be killed and started again."""

    def __init__(self, directory: Path, settings: ImageSettings) -> None:
        self._command = [sys.executable, __file__, str(directory), settings.reach_url]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        while b"answers" not in (line := self.process.stdout.readline()):
            assert line, "the API did not start"

    def kill(self) -> None:
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


class Cloud(NamedTuple):
    api: Api
    images: LocalImages  # a conductor's
    host: ImageCache
    folder: Path

    async def uploaded(self, content: bytes) -> str:
        fields = {"name": "n", "disk_format": "raw", "container_format": "bare"}
        image = await self.images.create(fields, MINE)

        async def chunks() -> AsyncIterator[bytes]:
            yield content

        await self.images.upload(image.id, chunks(), MINE)
        return image.id


@pytest.fixture
def by_http() -> ImageSettings:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return ImageSettings(reach="http", reach_url=f"http://127.0.0.1:{port}")


@pytest.fixture
async def apart(tmp_path: Path, by_http: ImageSettings) -> AsyncIterator[Cloud]:
    directory = tmp_path / "cloud"
    directory.mkdir()
    store = SqliteStore(directory / "instar.db", durable=False)
    await store.open()
    images = LocalImages(store, directory, by_http)
    await images.open()
    host = ImageCache(HostPaths(tmp_path / "host"), settings=LibvirtSettings(), host="h1")
    await host.open()
    api = Api(directory, by_http)
    await asyncio.to_thread(api.start)
    yield Cloud(api, images, host, tmp_path)
    await asyncio.to_thread(api.kill)
    await host.close()
    await images.close()
    await store.close()


async def test_host_fetches_and_sends_images_that_it_cannot_see(apart, qemu_img):
    content = os.urandom(5 << 20)
    source = await apart.images.image_source(await apart.uploaded(content))
    assert source.location.startswith("http://") and "signature=" in source.location
    await apart.host.ensure(source)
    cached = apart.folder / "host" / "cache" / source.sha256
    assert cached.read_bytes() == content
    assert (await apart.images.image_file(source.id)).location.startswith("file:///")

    snapshot = str(uuid.uuid4())
    await apart.images.queue(snapshot, ImageDraft("snap", "p1", {"instance_uuid": "i-1", "image_type": "snapshot"}))
    target, data = await apart.images.upload_target(snapshot), qemu_img("disk.qcow2", "3M", "-f", "qcow2")
    told: list[int] = []
    for _ in range(2):  # a command may come twice
        await _send(data, target, snapshot, told)
    assert told[-1] == 100
    image = await apart.images.finish_upload(snapshot)
    assert (image.status, image.virtual_size_bytes) == ("active", 3 << 20)
    made = await apart.images.image_source(snapshot)
    assert made.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    with pytest.raises(ImageGone):  # a host that was slow changes nothing any more
        await _send(data, target, snapshot, told)
    assert sorted(path.name for path in (apart.folder / "cloud" / "images" / "incoming").iterdir()) == []


async def _send(data: Path, target: str, image_id: str, told: list[int]) -> None:
    await asyncio.to_thread(
        send, data, target, image_id, idle_timeout_s=10, stop=threading.Event(), tell=told.append
    )


async def test_fetch_goes_on_after_the_api_was_killed_and_came_back(apart, monkeypatch):
    monkeypatch.setattr(image_transfer, "AGAIN_MAX", 1000)  # a busy machine takes long to start a process
    content = os.urandom(48 << 20)
    source = await apart.images.image_source(await apart.uploaded(content))

    def fetch() -> bytes:
        parts, killed = [], False
        location, deadline = urlsplit(source.location), time.monotonic() + 2 * PATIENCE_S
        for chunk in fetched(location, source.id, source.size_bytes, idle_timeout_s=PATIENCE_S, deadline=deadline):
            parts.append(chunk)
            if not killed:
                killed = True
                apart.api.kill()
                threading.Timer(0.3, apart.api.start).start()
        return b"".join(parts)

    assert await asyncio.to_thread(fetch) == content


async def test_url_opens_one_image_for_one_method_and_expires(apart, by_http):
    one, other = await apart.uploaded(b"one"), await apart.uploaded(b"other")
    location = (await apart.images.image_source(one)).location
    query = urlsplit(location).query
    base = f"{by_http.reach_url}/image/hosts/images"
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        answer = await client.get(location, headers={"range": "bytes=1-"})
        assert (answer.status_code, answer.content) == (206, b"ne")
        for method, url in (
            ("GET", f"{base}/{other}?{query}"), ("PUT", location), ("GET", f"{base}/{one}"),
            ("GET", location.replace("expires=1", "expires=2")), ("GET", location[:-1] + "x"),
        ):  # fmt: skip
            assert (await client.request(method, url)).status_code == 403, (method, url)
        assert apart.images.urls is not None
        apart.images.urls._lifetime_s = -10
        answer = await client.get((await apart.images.image_source(one)).location)
        assert (answer.status_code, "expired" in answer.text) == (403, True)
        await apart.images.delete(one, MINE)
        assert (await client.get(location)).status_code == 404


async def test_what_a_host_sends_is_bounded_and_whole(apart):
    snapshot = str(uuid.uuid4())
    await apart.images.queue(snapshot, ImageDraft("snap", "p1", {"instance_uuid": "i-1"}))
    target = await apart.images.upload_target(snapshot)

    async def endless() -> AsyncIterator[bytes]:
        yield b"x" * 1000

    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        assert (await client.put(target, content=endless())).status_code == 400
        assert (await client.put(target, content=b"", headers={"x-openstack-image-size": str(2 << 40)})).status_code == 413
        wrong = await client.put(target, content=b"short", headers={"x-openstack-image-size": "9"})
        assert wrong.status_code == 400
    with pytest.raises(HypervisorError):
        await apart.images.finish_upload(snapshot)
    await apart.images.discard(snapshot)
    with pytest.raises(ImageGone):
        data = apart.folder / "data"
        data.write_bytes(b"late")
        await _send(data, target, snapshot, [])


async def test_without_the_setting_there_is_no_such_page(cloud, tmp_path):
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        assert (await client.get(f"{cloud.url}/image/hosts/images/x?expires=1&signature=a")).status_code == 404
    with pytest.raises(StartupError, match="reach_url"):
        await LocalImages(cloud.store, tmp_path, ImageSettings(reach="http")).open()


async def test_other_content_than_was_told_is_refused_by_the_host(apart):
    source = await apart.images.image_source(await apart.uploaded(b"right"))
    wrong = ImageSource(source.id, source.location, "raw", "0" * 64, source.size_bytes, source.size_bytes)
    with pytest.raises(HypervisorError, match="checksum"):
        await apart.host.ensure(wrong)


async def _serve(directory: Path, reach_url: str) -> None:
    cloud: Any = ImageCloud(directory, ImageSettings(reach="http", reach_url=reach_url))
    cloud._server = HttpServer(cloud.app, "127.0.0.1", urlsplit(reach_url).port or 0)
    await cloud.start()
    print("answers", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2]))
