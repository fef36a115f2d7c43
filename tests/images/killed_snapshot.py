"""A process that makes an image of an instance, and is killed (-9, by itself) at the point that it is told."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from instar.config import ImageSettings
from instar.images import naming, storing
from instar.images.blobs import Blobs
from instar.images.contract import ImageDraft
from instar.images.local import LocalImages
from instar.store.sqlite import SqliteStore

POINTS = ("queued", "writing", "written", "inspected", "active", "hashed", "placed", "named")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def make(directory: Path, image_id: str, data: Path, point: str) -> None:
    async def dying(*_given: Any, **_more: Any) -> None:
        _die()

    store = SqliteStore(directory / "instar.db", durable=False)
    await store.open()
    images = LocalImages(store, directory, ImageSettings())
    await images.open()
    await images.queue(image_id, ImageDraft("snap", "p1", {"instance_uuid": "i-1", "image_type": "snapshot"}))
    if point == "queued":
        _die()
    target = Path((await images.upload_target(image_id)).removeprefix("file://"))
    part = target.with_name(target.name + ".part")
    part.write_bytes(b"half")
    if point == "writing":
        _die()
    shutil.copyfile(data, part)
    part.rename(target)
    if point == "written":
        _die()
    await asyncio.gather(*images._naming._tasks.values())  # what an earlier such process left is put in order
    if point == "inspected":
        storing.image_upload_finish = dying  # type: ignore[assignment]
    elif point == "active":
        Blobs.discard_beside = dying  # type: ignore[method-assign]
    elif point == "hashed":
        Blobs.place = dying  # type: ignore[method-assign,assignment]
    elif point == "placed":
        naming.image_name_data = dying  # type: ignore[assignment]
    elif point == "named":
        Blobs.discard_incoming = dying  # type: ignore[method-assign]
    await images.finish_upload(image_id)
    await images.image_source(image_id)


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]))
