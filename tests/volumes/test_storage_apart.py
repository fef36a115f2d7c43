"""Volumes of several processes over one database: the data is one owner's, who is reached by the bus, and may be away."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from instar.bus.memory import MemoryBus
from instar.cli.volume_images import ImagesForVolumes
from instar.config import ImageSettings, VolumeSettings
from instar.errors import NotFound, QuotaExceeded, StartupError, StorageAway, VolumeUnusable
from instar.images.local import LocalImages
from instar.store.sqlite import SqliteStore
from instar.volumes import owner as owner_module
from instar.volumes.owner import VolumeOwner
from instar.volumes.remote_storage import RemoteStorage
from instar.volumes.service import Volumes
from tests.patience import PATIENCE_S
from tests.volumes.export_client import qemu_io

SERVER = str(uuid.uuid4())


class Processes:
    """Two APIs over one database and bus, and an owner that comes and goes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = SqliteStore(directory / "instar.db", durable=False)
        self.bus = MemoryBus()
        self.images = ImagesForVolumes(LocalImages(self.store, directory, ImageSettings()))
        self.settings = VolumeSettings(volumes=12)
        self.owner: VolumeOwner | None = None
        self.storages = [RemoteStorage(self.bus, self.store, patience_s=PATIENCE_S) for _ in range(2)]
        self.apis = [Volumes(self.store, self.settings, self.images, storage) for storage in self.storages]

    async def start_owner(self) -> None:
        self.owner = VolumeOwner(self.store, self.directory, self.settings, self.images, bus=self.bus)
        await self.owner.open()
        for storage in self.storages:
            storage._patience_s = PATIENCE_S

    async def stop_owner(self) -> None:
        if self.owner is not None:
            await self.owner.close()
        self.owner = None
        for storage in self.storages:
            storage._patience_s = 0.3

    def files(self) -> list[str]:
        return sorted(path.stem for path in (self.directory / "volumes").rglob("*.qcow2"))


@pytest.fixture
async def processes(directory: Path) -> AsyncIterator[Processes]:
    made = Processes(directory)
    await made.store.open()
    await made.bus.open()
    await made.start_owner()
    yield made
    await made.stop_owner()
    await made.bus.close()
    await made.store.close()


def create(api: Volumes, volume_id: str, **fields: Any) -> Awaitable[None]:
    given = {"project_id": "p1", "user_id": "u1", "size_gib": 1, "name": "data", **fields}
    return api.create(volume_id, **given)


async def test_what_was_asked_while_the_owner_was_away_is_done_when_it_is_back(processes: Processes) -> None:
    one, other = processes.apis
    kept, gone, attachment = (str(uuid.uuid4()) for _ in range(3))
    for volume_id in (kept, gone):
        await create(one, volume_id)
        assert (await other.until_available(volume_id, PATIENCE_S)).status == "available"
    await one.reserve(attachment, kept, instance_id=SERVER)
    connection = await one.connect(attachment, host="h1", host_ip="127.0.0.1", device="/dev/vdb")
    await other.complete(attachment)
    await qemu_io(connection, "write -P 6 0 64k", "flush")
    assert await other.served_in_vain() == ()

    await processes.stop_owner()
    await qemu_io(connection, "read -P 6 0 64k")  # who has a volume does not notice
    record = await one.fetch(gone, project_id="p1", is_admin=False)
    await one.delete_begin(record, ("available",))
    late = str(uuid.uuid4())
    await create(other, late)
    with pytest.raises(StorageAway) as refused:
        await other.connect(attachment, host="h1", host_ip="127.0.0.1", device="/dev/vdb")
    assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
    await one.detach(attachment)
    assert processes.files() == sorted([kept, gone])

    await processes.start_owner()
    assert (await one.until_available(late, PATIENCE_S)).status == "available"
    await one.delete(gone)
    assert processes.files() == sorted([kept, late])
    assert await other.served_in_vain() == ()
    with pytest.raises(NotFound):
        await other.storage.serve(attachment, host_ip="")
    for volume_id in (kept, late):
        await one.delete(volume_id)
    assert processes.files() == []


async def test_one_process_owns_the_directory(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "LOCK_MAX_S", 0.2)
    second = VolumeOwner(processes.store, processes.directory, processes.settings, processes.images)
    with pytest.raises(StartupError, match="Another process"):
        await second.open()


async def test_requests_of_two_processes_at_once_are_one_after_the_other(processes: Processes) -> None:
    apis = processes.apis
    wanted = [str(uuid.uuid4()) for _ in range(20)]
    ends = await asyncio.gather(*(create(apis[n % 2], one) for n, one in enumerate(wanted)), return_exceptions=True)
    made = [one for one, end in zip(wanted, ends, strict=True) if end is None]
    assert len(made) == 12 and sum(isinstance(end, QuotaExceeded) for end in ends) == 8
    volume_id = made[0]
    for one in made:
        await apis[0].until_available(one, PATIENCE_S)

    reserved = await asyncio.gather(
        *(apis[n % 2].reserve(str(uuid.uuid4()), volume_id, instance_id=str(uuid.uuid4())) for n in range(10)),
        return_exceptions=True,
    )
    assert sum(end is None for end in reserved) == 1
    assert all(isinstance(end, VolumeUnusable) for end in reserved if end is not None)
    [attachment] = await apis[0].attachments()
    await apis[0].connect(attachment.id, host="h1", host_ip="", device="/dev/vdb")
    await apis[1].complete(attachment.id)
    # A delete and a detach: whoever is first, the volume is never gone under its attachment.
    record = await apis[0].fetch(volume_id, project_id="p1", is_admin=False)
    with pytest.raises(VolumeUnusable):
        await apis[1].delete_begin(record, ("available", "in-use"))
    marks = [apis[n % 2].mark_detaching(attachment.id, detaching=True) for n in range(4)]
    assert await asyncio.gather(*marks) == [None] * 4
    await asyncio.gather(*(apis[n % 2].detach(attachment.id) for n in range(4)))
    assert (await apis[0].volume_fetch(volume_id, project_id="p1", is_admin=False)).status == "available"
    deleted = await asyncio.gather(*(apis[n % 2].delete(one) for n, one in enumerate(made * 2)))
    assert deleted == [None] * 24 and processes.files() == []
