"""The SHA-256 of data that a host has written, and by it the data's final name: found after the image is active.

To read an image takes as long as writing it did, and nobody needs its SHA-256 before a host is to run it. So the server of
which it was made does not stay in its task meanwhile, and an image that is soon deleted is never read; whoever needs it
waits here. Until then the data is `incoming/<image id>`. Called by `local.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

from instar.errors import HypervisorError
from instar.images.blobs import Blobs, Received
from instar.store.contract import Store
from instar.store.images import image_data_used, image_fetch, image_name_data, image_unnamed

log = structlog.get_logger()

EARLY_MAX = 16  # images that are read before they are active
LOOK_MIN_S, LOOK_MAX_S = 0.02, 1.0  # while another process is at it


class Naming:
    """One task for each image that waits; the threads that read files bound how many are read at once."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store, self._blobs = store, blobs
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._early: dict[str, asyncio.Task[tuple[Received, str]]] = {}

    async def begin_all(self) -> None:
        """What an earlier process did not get to is done now."""
        for image_id in await image_unnamed(self._store):
            self.begin(image_id)

    async def close(self) -> None:
        tasks = [*self._tasks.values(), *self._early.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def read_early(self, image_id: str) -> None:
        """The data will need a name in a moment, and does not change any more: what it has is found meanwhile."""
        if image_id not in self._early and len(self._early) < EARLY_MAX:
            task = asyncio.create_task(self._blobs.hashed(image_id), name=f"image-reading-{image_id}")
            self._early[image_id] = task
            task.add_done_callback(lambda done: self._read(image_id, done))

    def _read(self, image_id: str, task: asyncio.Task[tuple[Received, str]]) -> None:
        if task.cancelled() or task.exception() is not None:  # it is read once more when it is to be named
            self._early.pop(image_id, None)

    def forget_early(self, image_id: str) -> None:
        """It needs no name after all, or has one."""
        early = self._early.pop(image_id, None)
        if early is not None:
            early.cancel()

    def begin(self, image_id: str) -> asyncio.Task[None]:
        """The image has data without a name."""
        task = self._tasks.get(image_id)
        if task is None:
            task = self._tasks[image_id] = asyncio.create_task(self._name(image_id), name=f"image-naming-{image_id}")
            task.add_done_callback(lambda done: self._ended(image_id, done))
        return task

    def _ended(self, image_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(image_id, None)
        self.forget_early(image_id)
        if not task.cancelled() and task.exception() is not None:  # the next sweep, or whoever needs it, tries again
            log.warning("image.not_named", image_id=image_id, error=type(task.exception()).__name__)

    async def named(self, image_id: str) -> None:
        """The image's data has its name; or it has none any more. Raises HypervisorError where it cannot be read."""
        task = self.begin(image_id)
        await asyncio.wait([task])  # who gives up waiting does not take the name from the others
        if not task.cancelled():
            task.result()

    async def give_up(self, image_id: str) -> None:
        """The image is gone: nobody reads its data any more, and none of it appears again."""
        tasks = [task for task in (self._early.pop(image_id, None), self._tasks.get(image_id)) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _name(self, image_id: str) -> None:
        """Killed anywhere in between, it is done again: the row says that it is still to be done."""
        pause_s = LOOK_MIN_S
        while await self._is_unnamed(image_id):
            # One lock for many images: 256 files in all.
            async with self._blobs.locks.hold_if_free(f"naming-{image_id[:2]}") as is_ours:
                if is_ours:
                    await self._name_once(image_id)
                    return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LOOK_MAX_S)

    async def _is_unnamed(self, image_id: str) -> bool:
        record = await image_fetch(self._store, image_id)
        return record is not None and record.size_bytes is not None and record.sha256 is None

    async def _name_once(self, image_id: str) -> None:
        try:
            received, sha256 = await self._hashed(image_id)
            await self._to_its_end(self._place(image_id, received, sha256))
        except FileNotFoundError:
            # The image was deleted meanwhile, or its data is lost.
            if await self._is_unnamed(image_id):
                raise HypervisorError(reason=f"the data of image {image_id} is lost") from None
        except OSError as error:
            raise HypervisorError(reason=f"the data of image {image_id} cannot be read") from error
        else:
            log.info("image.named", image_id=image_id, sha256=sha256)

    async def _hashed(self, image_id: str) -> tuple[Received, str]:
        early = self._early.get(image_id)
        if early is not None:
            try:
                await asyncio.wait([early])
                # Another file may be there by now, of an attempt that was faster.
                if not early.cancelled() and early.exception() is None:
                    received, sha256 = early.result()
                    if await self._blobs.is_hashed(image_id, sha256):
                        return received, sha256
            finally:
                self._early.pop(image_id, None)
        return await self._blobs.hashed(image_id)

    async def _to_its_end(self, placing: Coroutine[None, None, None]) -> None:
        """Who is cancelled here must not leave a file without a row, or the other way round."""
        task = asyncio.ensure_future(placing)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise

    async def _place(self, image_id: str, received: Received, sha256: str) -> None:
        async with self._blobs.locks.content(sha256):
            await self._blobs.place(received, sha256)
            if not await image_name_data(self._store, image_id, sha256) and not await image_data_used(self._store, sha256):
                await self._blobs.remove(sha256)
        await self._blobs.discard_incoming(image_id)
