"""Kill -9 in the middle of an upload: the next start finds nothing of it, and the image can be uploaded again."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx
import pytest
from image_client import Client
from image_cloud import ImageCloud

from tests.patience import PATIENCE_S

PROGRAM = Path(__file__).parent / "image_cloud.py"
HEADERS = {"x-auth-token": "member@p1"}


async def test_killed_upload_is_cleaned_at_the_next_start(tmp_path):
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert process.stdout is not None
            lines = [await process.stdout.readline()]
            while not lines[-1].startswith(b"http://"):
                lines.append(await process.stdout.readline())
        images = f"{lines[-1].decode().strip()}/image/v2/images"
        fields = {"name": "n", "disk_format": "raw", "container_format": "bare"}
        async with httpx.AsyncClient(headers=HEADERS, timeout=PATIENCE_S) as client:
            kept = (await client.post(images, json=fields)).json()["id"]
            lost = (await client.post(images, json=fields)).json()["id"]
            data = {"content-type": "application/octet-stream"}
            assert (await client.put(f"{images}/{kept}/file", content=b"kept", headers=data)).status_code == 204

            async def endless():
                while True:
                    yield b"z" * (1 << 20)

            upload = asyncio.create_task(client.put(f"{images}/{lost}/file", content=endless(), headers=data))
            incoming = tmp_path / "images" / "incoming"
            async with asyncio.timeout(PATIENCE_S):
                while not any(path.stat().st_size > 4 << 20 for path in incoming.iterdir()):
                    await asyncio.sleep(0.01)
            process.kill()
            await process.wait()
            await asyncio.gather(upload, return_exceptions=True)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    (tmp_path / "images" / ("0" * 64)).write_bytes(b"placed, but its transaction never came")
    assert len(list((tmp_path / "images" / "incoming").iterdir())) == 1

    cloud = ImageCloud(tmp_path)
    await cloud.start()
    try:
        assert len(cloud.files()) == 1
        images = f"{cloud.url}/image/v2/images"
        async with httpx.AsyncClient(headers=HEADERS, timeout=PATIENCE_S) as client:
            assert (await client.get(f"{images}/{kept}/file")).content == b"kept"
            assert (await client.get(f"{images}/{lost}")).json()["status"] == "queued"
            data = {"content-type": "application/octet-stream"}
            assert (await client.put(f"{images}/{lost}/file", content=b"again", headers=data)).status_code == 204
    finally:
        await cloud.stop()


async def test_client_that_goes_away_leaves_the_image_queued(cloud, member):
    image = await member.create()
    _, writer = await asyncio.open_connection("127.0.0.1", int(cloud.url.rsplit(":", 1)[1]))
    head = (
        f"PUT /image/v2/images/{image['id']}/file HTTP/1.1\r\nHost: x\r\nX-Auth-Token: member@p1\r\n"
        "Content-Type: application/octet-stream\r\nContent-Length: 5000000\r\n\r\n"
    )
    writer.write(head.encode() + b"x" * 2_000_000)
    await writer.drain()
    await member.wait_for_status(image["id"], "saving")
    writer.close()
    await member.wait_for_status(image["id"], "queued")
    assert cloud.files() == []


@pytest.mark.host
async def test_full_disk_refuses_the_upload_and_leaves_the_image_queued(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    mount = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(images))
    assert await mount.wait() == 0
    try:
        cloud = ImageCloud(tmp_path)
        await cloud.start()
        member = Client(cloud.url, "member@p1")
        try:
            image = await member.create()
            answer = await member.upload(image["id"], b"x" * (4 << 20), expect=413)
            assert "not enough space" in answer.text
            assert (await member.show(image["id"]))["status"] == "queued"
            assert cloud.files() == []
            await member.upload(image["id"], b"x" * (1 << 20))
        finally:
            await member.close()
            await cloud.stop()
    finally:
        unmount = await asyncio.create_subprocess_exec("umount", str(images))
        assert await unmount.wait() == 0
