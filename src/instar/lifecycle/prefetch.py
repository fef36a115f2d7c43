"""Images fetched into hosts' caches before any build wants them. Called by the Compute API (`os-aggregates/{id}/images`).

Not an operation: it belongs to no instance, nothing waits for it, and a build fetches what is missing anyway. What waits
when the process ends is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from instar.config import ImageSettings
from instar.engine.hosts import HostClient
from instar.errors import InstarError, Unavailable
from instar.lifecycle.cloud import Cloud

WAITING_MAX = 100_000  # pairs of a host and an image
RETRY_AFTER_S = 60

log = structlog.get_logger()


class ImagePrefetch:
    """A line of (host, image) pairs, worked off by at most `image.prefetch_max` tasks."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._settings: ImageSettings = cloud.settings.image
        self._waiting: dict[tuple[str, str], None] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def ask(self, image_ids: Iterable[str], hosts: Iterable[str]) -> None:
        """These hosts fetch these images soon; what waits already is not fetched twice. Raises Unavailable: too many."""
        hosts = list(hosts)
        # One image on all hosts before the next: a host is not given everything at once.
        pairs = {(host, image_id): None for image_id in image_ids for host in hosts}
        if len(self._waiting) + len(pairs) > WAITING_MAX:
            raise Unavailable(retry_after_s=RETRY_AFTER_S)
        self._waiting |= pairs
        while len(self._workers) < min(self._settings.prefetch_max, len(self._waiting)):
            worker = asyncio.create_task(self._work(), name="image prefetch")
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
            self._idle.clear()

    async def wait_until_done(self) -> None:
        """Nothing waits and nothing is fetched any more."""
        await self._idle.wait()

    async def close(self) -> None:
        self._waiting.clear()
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                host, image_id = pair = next(iter(self._waiting))
                del self._waiting[pair]
                await self._fetch(host, image_id)
        finally:
            # Here, not when the task has ended: until then nobody would work for who asks in between.
            self._workers -= {asyncio.current_task()}
            if not self._workers:
                self._idle.set()

    async def _fetch(self, host: str, image_id: str) -> None:
        try:
            source = await self._cloud.images.image_source(image_id)
            client = HostClient(
                self._cloud.bus, deadline_s=self._settings.prefetch_deadline_s,
                fell_silent=self._cloud.scheduler.fell_silent,  # a few of those that died would hold all who fetch
            )  # fmt: skip
            await client.ensure_image(host, source)
        except InstarError as error:
            log.warning("image.prefetch_failed", host=host, image_id=image_id, reason=error.message)
        except Exception:
            log.exception("image.prefetch_crashed", host=host, image_id=image_id)
        else:
            log.info("image.prefetched", host=host, image_id=image_id)
