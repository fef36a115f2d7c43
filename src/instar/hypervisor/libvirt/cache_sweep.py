"""Keeps the cache of images within its bound, and looks whether what is cached is still what it should be.

Run by `image_cache.py`, on a timer and after each new image. What a disk stands on (`cache_use.py`) stays in any case; of
the rest goes what was not used for long, and above the bound the least recently used first. Nothing that was in use a
short while ago goes: a build fetches its image before it makes the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

import structlog

from instar.config import LibvirtSettings
from instar.errors import InstarError
from instar.hypervisor.libvirt.cache_notes import CacheNotes
from instar.hypervisor.libvirt.cache_use import DisksInMotion, images_in_use
from instar.hypervisor.libvirt.host_paths import HostPaths

CHUNK_BYTES = 1 << 20
GIB = 1 << 30
_BLOCK_BYTES = 512  # unit of st_blocks, whatever the file system's own

log = structlog.get_logger()


class CachedFile(NamedTuple):
    """`cost_bytes`: what is free when it goes. Nothing, while the image service has the same file."""

    size_bytes: int
    mtime_ns: int
    cost_bytes: int

    @property
    def facts(self) -> tuple[int, int]:
        return self.size_bytes, self.mtime_ns


class Evict(Protocol):
    """Removes an image unless it was used since `used_at`; says whether it did."""

    def __call__(self, sha256: str, *, used_at: float) -> Awaitable[bool]: ...


class CacheSweep:
    """The sweeper of one cache. `is_busy`: images are being fetched, so the disk has enough to do."""

    def __init__(
        self,
        paths: HostPaths,
        notes: CacheNotes,
        *,
        settings: LibvirtSettings,
        evict: Evict,
        is_busy: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._paths, self._notes, self._settings = paths, notes, settings
        self._evict, self._is_busy, self._clock = evict, is_busy, clock
        self._opened_at = clock()
        self._wanted = asyncio.Event()
        self._stopping = threading.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._opened_at = self._clock()
        self._task = asyncio.create_task(self._sweep_for_ever(), name="image-cache-sweep")

    async def close(self) -> None:
        self._stopping.set()  # a thread that reads a large image ends
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def want(self) -> None:
        """Something was added: look soon."""
        self._wanted.set()

    async def _sweep_for_ever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.image_cache_sweep_s):
                    await self._wanted.wait()
            self._wanted.clear()
            try:
                await self.sweep()
            except DisksInMotion:
                log.info("image_cache.sweep_put_off")
            except (OSError, InstarError) as error:
                log.warning("image_cache.sweep_failed", error=type(error).__name__)

    async def sweep(self) -> None:
        """Once: evict, and verify one image that was not verified as it is now. Raises DisksInMotion, OSError."""
        cached = await asyncio.to_thread(self._list)
        self._notes.match(cached)
        # Read before the look: whoever takes an image during it is seen by a newer time.
        used_at = {sha256: self._notes.used_at(sha256) for sha256 in cached}
        used = await asyncio.to_thread(images_in_use, self._paths)
        for sha256 in used & used_at.keys():
            self._notes.used(sha256)
        unused = {sha256: at for sha256, at in used_at.items() if sha256 not in used}
        await self._evict_unused(cached, unused)
        if not self._is_busy():
            await self._verify_one(cached, unused)
        await asyncio.to_thread(self._notes.save, self._notes.encoded())

    async def _evict_unused(self, cached: dict[str, CachedFile], unused: dict[str, float]) -> None:
        """Removes from both what it evicts."""
        settings, now = self._settings, self._clock()
        bound = settings.image_cache_max_gib * GIB
        cost = sum(file.cost_bytes for file in cached.values())
        for sha256, at in sorted(unused.items(), key=lambda item: item[1]):
            if now - max(at, self._opened_at) < settings.image_cache_keep_s and not self._notes.is_damaged(sha256):
                continue
            file = cached[sha256]
            too_much = cost > bound and file.cost_bytes > 0
            if not (too_much or now - at >= settings.image_cache_unused_s or self._notes.is_damaged(sha256)):
                continue
            if await self._evict(sha256, used_at=at):
                cost -= file.cost_bytes
                del cached[sha256], unused[sha256]
                log.info("image_cache.evicted", sha256=sha256, bytes=file.cost_bytes, unused_s=round(now - at))
        if cost > bound:
            log.warning("image_cache.over_bound", bytes=cost, bound=round(bound), images=len(cached), unused=len(unused))

    async def _verify_one(self, cached: dict[str, CachedFile], unused: dict[str, float]) -> None:
        for sha256, file in cached.items():
            if self._notes.was_checked(sha256, file.facts):
                continue
            right = await asyncio.to_thread(self._is_right, sha256)
            if right is None:
                return
            if not right and sha256 in unused and await self._evict(sha256, used_at=unused[sha256]):
                log.error("image_cache.damaged_removed", sha256=sha256)
                return
            self._notes.checked(sha256, file.facts, right=right)
            if not right:
                log.error("image_cache.damaged", sha256=sha256)
            self.want()  # the next one, if there is another
            return

    # --- blocking -----------------------------------------------------------------------------------------------------

    def _list(self) -> dict[str, CachedFile]:
        found = {}
        for sha256 in self._paths.cached_images():
            with contextlib.suppress(FileNotFoundError):
                stat = self._paths.image(sha256).stat()
                cost = stat.st_blocks * _BLOCK_BYTES if stat.st_nlink == 1 else 0
                found[sha256] = CachedFile(stat.st_size, stat.st_mtime_ns, cost)
        return found

    def _is_right(self, sha256: str) -> bool | None:
        """None: it went meanwhile, or we are told to stop."""
        digest = hashlib.sha256()
        try:
            with self._paths.image(sha256).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    if self._stopping.is_set():
                        return None
                    digest.update(chunk)
        except FileNotFoundError:
            return None
        return digest.hexdigest() == sha256
