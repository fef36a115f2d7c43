"""Base images on a host: fetched once, verified by their SHA-256 while they are copied, then read only.

The driver calls `ensure`. A file of the same file system is linked, not copied; a remote one is streamed. The cache is
bounded: `cache_sweep.py` removes what no disk needs, never what is held, as whoever makes a disk of it does meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import structlog

from instar.errors import HypervisorError, ImageGone
from instar.hypervisor.image_transfer import fetched
from instar.hypervisor.libvirt.cache_notes import CacheNotes
from instar.hypervisor.libvirt.cache_sweep import CacheSweep
from instar.hypervisor.libvirt.host_paths import FULL, HostPaths, disk_full
from instar.hypervisor.libvirt.qcow2_header import read_header
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import ImageSource
from instar.model.hash_note import was_hashed_lately

CHUNK_BYTES = 1 << 20
PART_PREFIX = ".part-"
FETCHED_PREFIX = ".fetched-"
FETCHED_KEEP_S = 86_400.0  # what has come of an image from another host is worth keeping over a restart

Fetch = Callable[[Path], Awaitable[None]]

log = structlog.get_logger()


class ImageCache:
    """The cache of one state directory. `bearer_token` is asked before each download over http."""

    def __init__(
        self,
        paths: HostPaths,
        *,
        settings: LibvirtSettings,
        host: str,
        bearer_token: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._paths, self._settings, self._host, self._bearer_token = paths, settings, host, bearer_token
        self._copies: dict[str, asyncio.Task[None]] = {}
        self._holds: Counter[str] = Counter()
        self._gate = asyncio.Lock()  # held by an eviction, and for a moment by whoever takes an image into use
        self._notes = CacheNotes(paths.state_dir / "image-cache.json", clock)
        self.sweeper = CacheSweep(
            paths, self._notes, settings=settings, evict=self._evict, is_busy=lambda: bool(self._copies), clock=clock
        )

    async def open(self) -> None:
        """Remove what an earlier process did not finish."""
        await asyncio.to_thread(self._remove_parts)
        await asyncio.to_thread(self._notes.load)
        self.sweeper.open()

    async def close(self) -> None:
        await self.sweeper.close()
        copies = list(self._copies.values())
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)

    def damaged(self) -> tuple[str, ...]:
        """SHA-256 of images that disks stand on although their content is not what it was."""
        return self._notes.damaged()

    @contextlib.asynccontextmanager
    async def hold(self, sha256: str) -> AsyncIterator[None]:
        """The image is not evicted meanwhile, nor for some time after (`image_cache_keep_s`)."""
        async with self._gate:
            self._holds[sha256] += 1
            self._notes.used(sha256)
        try:
            yield
        finally:
            self._notes.used(sha256)
            self._holds[sha256] -= 1
            if not self._holds[sha256]:
                del self._holds[sha256]

    async def ensure(self, image: ImageSource) -> None:
        """The image is in the cache. Raises ImageGone, HypervisorError (not what it should be), DiskFull."""
        target = self._paths.image(image.sha256)
        async with self.hold(image.sha256):
            # A damaged one is fetched again and takes its place: guests that run have the old file open.
            if not self._notes.is_damaged(image.sha256) and await asyncio.to_thread(target.exists):
                return
            await self._one_copy(image.sha256, lambda: self._copy(image, target))
        self.sweeper.want()  # when it is no longer held

    async def ensure_from(self, sha256: str, image_format: str, fetch: Fetch) -> None:
        """The image is in the cache: `fetch` writes it to a file, from another host's cache. One that is the same by its
        SHA-256 needs no other proof. Raises HypervisorError, and what `fetch` raises."""
        target = self._paths.image(sha256)
        async with self.hold(sha256):
            if not self._notes.is_damaged(sha256) and await asyncio.to_thread(target.exists):
                return
            await self._one_copy(sha256, lambda: self._copy_from(sha256, image_format, fetch, target))
        self.sweeper.want()

    async def _one_copy(self, sha256: str, make: Callable[[], Coroutine[None, None, None]]) -> None:
        copy = self._copies.get(sha256)
        if copy is None:
            copy = asyncio.create_task(make(), name=f"image-{sha256[:12]}")
            self._copies[sha256] = copy
            copy.add_done_callback(lambda _done: self._copies.pop(sha256, None))
        # Shielded: a caller that is cancelled must not take the copy from the others.
        await asyncio.shield(copy)

    async def _copy_from(self, sha256: str, image_format: str, fetch: Fetch, target: Path) -> None:
        part = target.with_name(FETCHED_PREFIX + sha256)
        await asyncio.to_thread(part.parent.mkdir, mode=0o711, parents=True, exist_ok=True)
        if not await asyncio.to_thread(part.exists):
            await fetch(part)
        try:
            size_bytes = (await asyncio.to_thread(part.stat)).st_size
            image = ImageSource(
                id=sha256[:12], location="", format=image_format, sha256=sha256, size_bytes=size_bytes,
                virtual_size_bytes=self._settings.image_max_bytes,
            )  # fmt: skip
            deadline = time.monotonic() + self._settings.image_timeout_s
            await asyncio.to_thread(_verify_file, image, part, deadline)
            await self._inspect(image, part)
            facts = await asyncio.to_thread(_publish, part, target)
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)
        self._notes.used(sha256)
        self._notes.checked(sha256, facts, right=True)
        log.info("image.cached", image=image.id, bytes=size_bytes, of="another host")

    async def _evict(self, sha256: str, *, used_at: float) -> bool:
        async with self._gate:
            if sha256 in self._holds or sha256 in self._copies or self._notes.used_at(sha256) != used_at:
                return False
            await asyncio.to_thread(self._paths.image(sha256).unlink, missing_ok=True)
            self._notes.forget(sha256)
            return True

    async def _copy(self, image: ImageSource, target: Path) -> None:
        started = time.monotonic()
        part = target.with_name(PART_PREFIX + uuid.uuid4().hex)
        try:
            async with asyncio.timeout(self._settings.image_timeout_s):
                await asyncio.to_thread(self._fetch, image, part, started + self._settings.image_timeout_s)
                await self._inspect(image, part)
                facts = await asyncio.to_thread(_publish, part, target)
        except TimeoutError as error:
            limit = self._settings.image_timeout_s
            raise HypervisorError(reason=f"image {image.id} did not arrive within {limit:g} seconds") from error
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)
        self._notes.used(image.sha256)
        self._notes.checked(image.sha256, facts, right=True)
        log.info("image.cached", image=image.id, bytes=image.size_bytes, took_s=round(time.monotonic() - started, 3))

    def _fetch(self, image: ImageSource, part: Path, deadline: float) -> None:
        """Blocking: link or copy, and verify."""
        part.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        location = urlsplit(image.location)
        if image.size_bytes > self._settings.image_max_bytes:
            raise HypervisorError(reason=f"image {image.id} is larger than this host accepts")
        try:
            if location.scheme == "file" and location.netloc in ("", "localhost"):
                self._fetch_file(image, Path(unquote(location.path)), part, deadline)
            elif location.scheme in ("http", "https"):
                chunks = fetched(
                    location, image.id, image.size_bytes, idle_timeout_s=self._settings.image_idle_timeout_s,
                    deadline=deadline, token=self._token(),
                )  # fmt: skip
                self._store(image, chunks, part, deadline)
            else:
                raise HypervisorError(reason=f"the location of image {image.id} is of an unknown kind")
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(part, self._host) from error
            log.warning("image.fetch_failed", image=image.id, error=type(error).__name__, errno=error.errno)
            raise HypervisorError(reason=f"image {image.id} could not be fetched") from error
        except http.client.HTTPException as error:
            raise HypervisorError(reason=f"image {image.id} could not be fetched") from error

    def _fetch_file(self, image: ImageSource, source: Path, part: Path, deadline: float) -> None:
        try:
            os.link(source, part)
        except FileNotFoundError as error:
            raise ImageGone(image_id=image.id) from error
        except OSError:
            with source.open("rb") as file:
                self._store(image, _chunks(file), part, deadline)
            return
        if not (part.stat().st_size == image.size_bytes and was_hashed_lately(part, image.sha256)):
            with part.open("rb") as file:
                _verify(image, _chunks(file), deadline)
        # The same file as the image service's: it is read only there as well, never rewritten in place.
        part.chmod(part.stat().st_mode & 0o555)

    def _store(self, image: ImageSource, chunks: Iterator[bytes], part: Path, deadline: float) -> None:
        room = os.statvfs(part.parent)
        if room.f_bavail * room.f_frsize < image.size_bytes + (self._settings.disk_reserved_mib << 20):
            raise disk_full(part, self._host)
        with part.open("xb") as file:
            _verify(image, chunks, deadline, file.write)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o444)

    async def _inspect(self, image: ImageSource, part: Path) -> None:
        """Refuse what would make QEMU open other files. The image service has looked already; this is the last door."""
        if image.format not in ("qcow2", "raw"):
            raise HypervisorError(reason=f"image {image.id} has format {image.format}, this host takes qcow2 and raw")
        if image.format == "raw":
            return
        try:
            header = await asyncio.to_thread(read_header, part)
        except HypervisorError as error:
            raise HypervisorError(reason=f"image {image.id} is no qcow2 image") from error
        if header.backing or header.elsewhere:
            raise HypervisorError(reason=f"image {image.id} refers to other files")
        if header.virtual_size_bytes > image.virtual_size_bytes:
            raise HypervisorError(reason=f"image {image.id} is larger than it says")

    def _token(self) -> str | None:
        return self._bearer_token() if self._bearer_token is not None else None

    def _remove_parts(self) -> None:
        if self._paths.cache.is_dir():
            for part in self._paths.cache.glob(PART_PREFIX + "*"):
                part.unlink(missing_ok=True)
            for part in self._paths.cache.glob(f"*{FETCHED_PREFIX}*"):
                if time.time() - part.stat().st_mtime > FETCHED_KEEP_S:
                    part.unlink(missing_ok=True)


def _verify_file(image: ImageSource, part: Path, deadline: float) -> None:
    """Blocking. Raises HypervisorError when the file is not the image; makes it read only."""
    with part.open("rb") as file:
        _verify(image, _chunks(file), deadline)
        os.fchmod(file.fileno(), 0o444)


def _publish(part: Path, target: Path) -> tuple[int, int]:
    """Blocking: give the file its name; its size and mtime in nanoseconds."""
    part.rename(target)
    stat = target.stat()
    return stat.st_size, stat.st_mtime_ns


class _Readable(Protocol):
    """What files and HTTP answers have in common."""

    def read(self, size: int, /) -> bytes: ...


def _chunks(source: _Readable) -> Iterator[bytes]:
    while chunk := source.read(CHUNK_BYTES):
        yield chunk


def _verify(
    image: ImageSource, chunks: Iterator[bytes], deadline: float, write: Callable[[bytes], object] | None = None
) -> None:
    """Read all chunks, hand them to `write`; raises HypervisorError when they are not the image."""
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        size_bytes += len(chunk)
        if size_bytes > image.size_bytes:
            raise HypervisorError(reason=f"image {image.id} is longer than {image.size_bytes} bytes")
        if time.monotonic() > deadline:
            raise HypervisorError(reason=f"image {image.id} did not arrive in time")
        digest.update(chunk)
        if write is not None:
            write(chunk)
    if size_bytes != image.size_bytes or digest.hexdigest() != image.sha256:
        raise HypervisorError(reason=f"image {image.id} does not match its checksum")
