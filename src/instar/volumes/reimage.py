"""A volume's data is replaced by an image's, for the rebuild of a server that boots from it: part of `service.Volumes`.

The volume keeps its id, size, type and attachments. What it had before is kept beside the new data until the rebuild has
ended, so that one that fails gives it back. Each part is a job like any other (`jobs.py`): it stands in the record first.
"""

from __future__ import annotations

import asyncio

from instar.errors import NotFound, StepTimeout, VolumeFailed, VolumeUnusable
from instar.model.storage import StorageSubject
from instar.store import volumes as sql
from instar.store.contract import Store
from instar.store.volume_records import VolumeRecord, Work
from instar.volumes.files import GIB
from instar.volumes.images import VolumeImages
from instar.volumes.storage import Storage, volume_subject

REPLACE, GIVE_BACK, LET_GO = "reimage", "reimage-undo", "reimage-end"
REPLACING = "downloading"  # the status while no guest may have it open
_CLOSED = ("reserved", "available")
_OPEN = ("in-use", "attaching", "detaching", *_CLOSED)


class Reimaging:
    def __init__(self, store: Store, storage: Storage, images: VolumeImages) -> None:
        self._store, self._storage, self._images = store, storage, images

    async def replace(self, volume_id: str, image_id: str, *, turn: str, deadline_s: float) -> None:
        record = await self._record(volume_id)
        if record.document.reimaged == turn:
            return
        image = await self._images.image_source(image_id)
        if image.virtual_size_bytes > record.size_gib * GIB:
            raise VolumeUnusable(volume_id=volume_id, reason=f"its {record.size_gib} GiB are too small for the image.")
        await self._have_done(record, Work(REPLACE, image_id=image_id, turn=turn), _CLOSED, REPLACING, deadline_s)
        if (await self._record(volume_id)).document.reimaged != turn:
            raise VolumeFailed(volume_id=volume_id, reason="the image could not be copied to it")

    async def give_back(self, volume_id: str, *, turn: str, deadline_s: float) -> None:
        """Also of one that is replaced right now: that ends first."""
        await self._ended(volume_subject(volume_id), deadline_s)
        record = await self._record(volume_id)
        await self._have_done(record, Work(GIVE_BACK, turn=turn), _CLOSED, REPLACING, deadline_s)
        if (await self._record(volume_id)).document.reimaged == turn:
            raise VolumeFailed(volume_id=volume_id, reason="what it had before could not be given back")

    async def let_go(self, volume_id: str, image_id: str, *, deadline_s: float) -> None:
        record = await self._record(volume_id)
        await self._have_done(record, Work(LET_GO, image_id=image_id), _OPEN, None, deadline_s)

    async def _have_done(
        self, record: VolumeRecord, work: Work, allowed: tuple[str, ...], during: str | None, deadline_s: float
    ) -> None:
        """`during`: the status while it is done; None leaves it. Raises VolumeUnusable, StepTimeout."""
        if record.work != work:
            refused = VolumeUnusable(
                volume_id=record.id, reason=f"its status must be {' or '.join(allowed)}, but it is {record.status}."
            )
            if record.status not in allowed:
                raise refused
            status = sql.volume_status(
                record.id, before=(record.status,), after=during or record.status, work=work, error=refused
            )
            await self._store.write(status)
        subject = volume_subject(record.id)
        await self._storage.wake(subject)
        await self._ended(subject, deadline_s)

    async def _ended(self, subject: StorageSubject, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await self._storage.ended(subject)
        except TimeoutError as error:
            raise StepTimeout(what=f"volume {subject.id}", waited_s=deadline_s) from error

    async def _record(self, volume_id: str) -> VolumeRecord:
        record = await sql.volume_fetch(self._store, volume_id)
        if record is None:
            raise NotFound(kind="Volume", id=volume_id)
        return record
