"""Kill -9 in the middle of slow work: the next start finishes or undoes it, and nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from instar.store.contract import Statement
from instar.store.volume_records import Work, work_value
from tests.patience import PATIENCE_S
from tests.volumes.volume_client import Client
from tests.volumes.volume_cloud import VolumeCloud

PROGRAM = Path(__file__).parent / "volume_cloud.py"
DATA = 192 << 20


@contextlib.asynccontextmanager
async def doomed(directory: Path) -> AsyncIterator[Client]:
    """A client of a cloud in a process of its own, which is killed at the end."""
    process = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, str(PROGRAM), str(directory)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = ""
        async with asyncio.timeout(PATIENCE_S):
            while not line.startswith("http://"):
                line = await asyncio.to_thread(process.stdout.readline)
        client = Client(line.strip(), "member@p1")
        yield client
        await client.close()
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
        assert process.stdout is not None
        process.stdout.close()


async def upload(client: Client, directory: Path) -> str:
    """A raw image of random data: its copy takes a while."""
    import httpx

    url = str(client.http.base_url).replace("/volume/v3/", "/image/v2/images")
    async with httpx.AsyncClient(headers=client.http.headers, timeout=120) as http:
        body = {"name": "big", "disk_format": "raw", "container_format": "bare"}
        image_id = (await http.post(url, json=body)).json()["id"]
        block = os.urandom(1 << 20)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(DATA >> 20):
                yield block

        headers = {"content-type": "application/octet-stream"}
        assert (await http.put(f"{url}/{image_id}/file", content=chunks(), headers=headers)).status_code == 204
    return image_id


async def growing(directory: Path) -> None:
    """Something is being made."""
    incoming = directory / "volumes" / "incoming"
    async with asyncio.timeout(PATIENCE_S):
        while not any(size > 1 << 20 for size in await asyncio.to_thread(sizes, incoming)):
            await asyncio.sleep(0.002)


def sizes(directory: Path) -> list[int]:
    found = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_size)
    return found


@pytest.mark.slow
async def test_what_a_killed_cloud_was_making_is_made_by_the_next(directory: Path) -> None:
    async with doomed(directory) as client:
        image_id = await upload(client, directory)
        body = {"volume": {"size": 1, "imageRef": image_id}}
        volume_id = (await client.call("POST", "/volumes", 202, json=body))["volume"]["id"]
        await growing(directory)
    cloud = VolumeCloud(directory)
    await cloud.start()
    member = Client(cloud.url, "member@p1")
    try:
        await member.until(f"/volumes/{volume_id}", "volume", "available")
        assert cloud.files() == [f"{volume_id}.qcow2"]
        checked = await asyncio.to_thread(
            subprocess.run, ["qemu-img", "check", str(cloud.volumes.owner.files.volume(volume_id))], capture_output=True
        )
        assert checked.returncode == 0
    finally:
        await cloud.stop()
        await member.close()
    async with doomed(directory) as client:
        told = await client.action(volume_id, "os-volume_upload_image", {"image_name": "back", "disk_format": "raw"})
        image_id = told["os-volume_upload_image"]["image_id"]
        snapshot = {"snapshot": {"volume_id": volume_id, "force": True}}
        await client.call("POST", "/snapshots", 400, json=snapshot)  # while it is uploading
        await growing(directory)
    cloud = VolumeCloud(directory)
    await cloud.start()
    member = Client(cloud.url, "member@p1")
    try:
        await member.until(f"/volumes/{volume_id}", "volume", "available")
        made = await cloud.images.image_fetch(image_id, project_id="p1", is_admin=False)
        assert (made.status, made.virtual_size_bytes) == ("active", 1 << 30)
        await member.delete(volume_id)
        assert cloud.files() == []
    finally:
        await cloud.stop()
        await member.close()


async def test_records_and_files_that_do_not_fit_are_put_right_at_the_start(directory: Path) -> None:
    """As a crash leaves them: a delete that was begun, a copy half done, files of nobody, a file that is lost."""
    cloud = VolumeCloud(directory)
    await cloud.start()
    member = Client(cloud.url, "member@p1")
    ids = [(await member.create())["id"] for _ in range(4)]
    kept, deleting, lost, extending = ids
    await cloud.stop()
    await member.close()
    root = directory / "volumes"
    await asyncio.to_thread((root / f"{lost}.qcow2").unlink)
    stray = root / "11111111-1111-4111-8111-111111111111.qcow2"
    for path in (stray, root / "snapshots" / stray.name, root / "incoming" / "half"):
        await asyncio.to_thread(path.write_bytes, b"x")
    await cloud.store.open()
    mark = "UPDATE volumes SET status = :status, status_before = 'available', work = :work, size_gib = :size WHERE id = :id"
    for volume_id, status, work, size in (
        (deleting, "deleting", Work("delete"), 1),
        (extending, "extending", Work("extend", size_gib=1), 2),
    ):
        params = {"id": volume_id, "status": status, "work": work_value(work), "size": size}
        await cloud.store.write(Statement(mark, params))
    await cloud.store.close()

    again = VolumeCloud(directory)
    await again.start()
    member = Client(again.url, "member@p1")
    try:
        await member.gone(f"/volumes/{deleting}")
        assert (await member.until(f"/volumes/{extending}", "volume", "available"))["size"] == 2
        assert await again.volumes.owner.files.size_bytes(again.volumes.owner.files.volume(extending)) == 2 << 30
        assert (await member.show(kept))["status"] == "available"
        assert (await member.show(lost))["status"] == "error"
        assert again.files() == sorted([f"{kept}.qcow2", f"{extending}.qcow2"])
        await member.delete(lost)
    finally:
        await again.stop()
        await member.close()
