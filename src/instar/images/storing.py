"""Data and its row, brought together and taken apart: what client uploads and host uploads have in common.

Called by `local.py` and `instance_images.py`. Both directions hold the lock of the content, which all processes that share
the directory respect: a file never goes while another image with the same content has just found it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from instar.config import ImageSettings
from instar.errors import Conflict, NotFound
from instar.images.blobs import Blobs, Received
from instar.images.inspect import inspect_image
from instar.store.contract import Store
from instar.store.images import (
    ImageRecord,
    StoredData,
    image_data_used,
    image_delete,
    image_upload_finish,
)

log = structlog.get_logger()


class Storing:
    """`clock` gives microseconds since the epoch."""

    def __init__(self, store: Store, blobs: Blobs, settings: ImageSettings, clock: Callable[[], int]) -> None:
        self._store, self._blobs, self._settings, self._clock = store, blobs, settings, clock

    async def keep(
        self, record: ImageRecord, upload_id: str, received: Received, *, ready: Awaitable[None] | None = None
    ) -> None:
        """Inspect what arrived, give it its final name if its SHA-256 is known, and make the image active when `ready`.

        Raises NotFound where the image is gone or no longer this upload's, UnsupportedMedia, ImageUnusable."""
        virtual_size = await inspect_image(
            received.path,
            record.disk_format or "",
            virtual_size_max_bytes=self._settings.virtual_size_max_bytes,
            deadline_s=self._settings.inspect_deadline_s,
        )
        if ready is not None:
            await ready
        data = StoredData(received.size_bytes, virtual_size, received.md5, received.sha256, received.sha512)
        # Shielded: a caller that is cancelled here must not leave a file without a row, or the other way round.
        await asyncio.shield(self._place(record.id, upload_id, received, data))
        log.info("image.stored", image_id=record.id, size_bytes=data.size_bytes, sha256=data.sha256)

    async def _place(self, image_id: str, upload_id: str, received: Received, data: StoredData) -> None:
        if received.sha256 is None:
            await image_upload_finish(self._store, image_id, upload_id, data, now=self._clock())
            return
        async with self._blobs.locks.content(received.sha256):
            await self._blobs.place(received, received.sha256)
            try:
                await image_upload_finish(self._store, image_id, upload_id, data, now=self._clock())
            except NotFound:
                if not await image_data_used(self._store, received.sha256):
                    await self._blobs.remove(received.sha256)
                raise

    async def remove(self, image_id: str, *, even_protected: bool = False) -> None:
        """The image is gone; its data, too, when no other image has the same, and what a host was writing for it.

        Raises Conflict where the image is gone already, or protected."""
        sha256 = await image_delete(self._store, image_id, now=self._clock(), even_protected=even_protected)
        if sha256 is not None:
            await self.remove_unused(sha256)
        await self._blobs.discard_incoming(image_id)

    async def remove_unused(self, sha256: str) -> bool:
        """The data is gone if no image has it. Killed before it came to this, `LocalImages.sweep` does it."""
        async with self._blobs.locks.content(sha256):
            if await image_data_used(self._store, sha256):
                return False
            await self._blobs.remove(sha256)
            return True

    async def ensure_removed(self, image_id: str) -> None:
        """The same for an image that may be gone, or protected."""
        try:
            await self.remove(image_id, even_protected=True)
        except Conflict:
            # A host may have written after somebody else's delete.
            await self._blobs.discard_incoming(image_id)
