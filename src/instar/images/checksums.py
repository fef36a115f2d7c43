"""The hashes that clients of the Image API ask for, of data that a host has written: computed after the image is active.

An image needs its SHA-256 to be used: hosts verify it (see naming.py). MD5 and SHA-512 take five times as long and are
there for clients alone, so they come last. Until they are known the API shows null. Of the processes that share the image
directory one computes at a time; the others look again later. Called by `local.py`.
"""

from __future__ import annotations

import asyncio

import structlog

from instar.errors import InstarError
from instar.images.blobs import Blobs
from instar.store.contract import Store
from instar.store.images import image_checksums_missing, image_checksums_set

log = structlog.get_logger()

RETRY_S = 30.0
PAUSE_S = 1.0  # an image that is deleted at once is not read, and what follows on its making goes first


class Checksums:
    """One task, one file at a time: it is to leave processors to what somebody waits for."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store, self._blobs = store, blobs
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """What an earlier process did not get to is computed now."""
        self._wanted.set()
        self._task = asyncio.create_task(self._work(), name="image-checksums")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def want(self) -> None:
        """There is an image without them."""
        self._wanted.set()

    async def _work(self) -> None:
        """The database says what is missing, so nothing is lost in a crash."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(PAUSE_S)
            self._wanted.clear()
            try:
                await self._compute_missing()
            except (InstarError, OSError) as error:
                log.warning("images.checksums_later", error=type(error).__name__, retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
                self._wanted.set()

    async def _compute_missing(self) -> None:
        while missing := await image_checksums_missing(self._store):
            async with self._blobs.locks.hold_if_free("checksums") as is_ours:
                if is_ours:
                    for sha256 in missing:
                        await self._compute(sha256)
                    return
            await asyncio.sleep(RETRY_S)  # another process is at it, and may die

    async def _compute(self, sha256: str) -> None:
        try:
            md5, sha512 = await self._blobs.checksums(sha256)
        except FileNotFoundError:
            return  # its last image was deleted meanwhile; if it is lost, whoever reads the image says so
        await image_checksums_set(self._store, sha256, md5=md5, sha512=sha512)
