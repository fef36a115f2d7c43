"""Images that operations on instances make: snapshots, backups, shelved disks. Called by `local.py`, for the lifecycle.

queue → upload_target → (the host writes) → finish_upload; discard undoes all of it. Each may come twice. The incoming
file outlives a crash: the operation that wants it is taken up again, and either finishes it or discards it. A file
without such an image is swept at the next start. The data stays under its incoming name when the image is active, until
`naming.py` has its SHA-256: it is linked then, never copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from uuid import uuid4

import msgspec

from instar.errors import (
    BadRequest,
    Conflict,
    HypervisorError,
    ImageGone,
    ImageUnusable,
    InstarError,
    NotFound,
    UnsupportedMedia,
)
from instar.images.blobs import Blobs
from instar.images.contract import ImageDraft
from instar.images.fields import Caller, is_field, new_image
from instar.images.storing import Storing
from instar.store.contract import Store
from instar.store.images import ImageRecord, image_fetch, image_switch, image_update
from instar.store.instance_images import (
    instance_image_begin,
    instance_image_insert,
    instance_image_saving,
)

INSTANCE_PROPERTY = "instance_uuid"  # the Image API's name of the property that says of which instance
EDIT_ATTEMPTS_MAX = 20  # each one that fails means that a user changed the image
_DONE = ("active", "deactivated")


class InstanceImages:
    """`size_max_bytes` bounds what a host may write; `clock` gives microseconds since the epoch. `taken_over` hears of data
    that does not change any more, before its image is active."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        storing: Storing,
        *,
        size_max_bytes: int,
        clock: Callable[[], int],
        taken_over: Callable[[str], None],
    ) -> None:
        self._taken_over = taken_over
        self._store, self._blobs, self._storing, self._clock = store, blobs, storing, clock
        self._size_max_bytes = size_max_bytes

    async def queue(self, image_id: str, draft: ImageDraft) -> None:
        """See the contract. Raises BadRequest for a name or property that no image may have."""
        for name in draft.properties:
            if is_field(name):
                raise BadRequest(f"'{name}' cannot be a property of an image.")
        fields = {
            "id": image_id,
            "name": draft.name,
            "disk_format": draft.disk_format,
            "container_format": "bare",
            "visibility": draft.visibility,
            "min_disk": draft.min_disk_gib,
            "min_ram": draft.min_ram_mib,
        }
        record = new_image(fields | draft.properties, Caller(draft.project_id, is_admin=False), self._clock())
        await instance_image_insert(self._store, record, draft.properties.get(INSTANCE_PROPERTY))

    async def upload_target(self, image_id: str) -> str:
        """See the contract. Raises ImageGone, and Conflict where the image has other data."""
        record = await instance_image_begin(self._store, image_id, now=self._clock())
        if record is None:
            raise ImageGone(image_id=image_id)
        return self._blobs.incoming(record.id).as_uri()

    async def finish_upload(self, image_id: str) -> ImageRecord:
        """See the contract."""
        record = await self._fetch(image_id)
        if record.status in _DONE:
            await self._tidy(record)  # after a run that was killed right after it had the row written
            return record
        if not await instance_image_saving(self._store, image_id):
            await self._fetch(image_id)  # raises ImageGone where it was deleted at this moment
            raise HypervisorError(reason=f"no host was told to write image {image_id}")
        try:
            async with self._blobs.locks.hold(_lock_of(image_id)):
                received = await self._blobs.adopt(image_id, size_max_bytes=self._size_max_bytes)
                self._taken_over(image_id)
                synced = asyncio.ensure_future(self._blobs.synced(image_id))
                try:
                    await self._storing.keep(record, image_id, received, ready=synced)
                finally:
                    await asyncio.wait([synced])
        except (FileNotFoundError, NotFound, ImageUnusable, UnsupportedMedia) as error:
            # The file was taken from under us, when the image was deleted meanwhile or another call for it was faster.
            record = await self._fetch(image_id)
            if record.status not in _DONE:
                if isinstance(error, InstarError):
                    raise
                raise HypervisorError(reason=f"the host wrote no data for image {image_id}") from error
        record = await self._fetch(image_id)
        await self._tidy(record)
        return record

    async def receive(self, image_id: str, chunks: AsyncIterator[bytes], size_bytes: int) -> None:
        """What a host writes that does not see the directory: whole under the incoming name, in the place of what an
        earlier attempt sent. Raises ImageGone (nobody wants it any more), BadRequest, TooLarge."""
        if not await instance_image_saving(self._store, image_id):
            raise ImageGone(image_id=image_id)
        name = f"{image_id}.{uuid4().hex}"
        async with self._blobs.writing(name) as incoming:
            received = await incoming.receive(chunks, size_max_bytes=self._size_max_bytes)
            if received.size_bytes != size_bytes:
                raise BadRequest(f"{size_bytes} bytes were announced, but {received.size_bytes} arrived.")
            async with self._blobs.locks.hold(_lock_of(image_id)):
                # A host that was slow must not change what has been taken over from another attempt meanwhile.
                if not await instance_image_saving(self._store, image_id):
                    raise ImageGone(image_id=image_id)
                await self._blobs.rename_incoming(name, image_id)

    async def _tidy(self, record: ImageRecord) -> None:
        """Nothing is left of the upload but, until it has its final name, the data itself."""
        if record.sha256 is None and record.size_bytes is not None:
            await self._blobs.discard_beside(record.id)
        else:
            await self._blobs.discard_incoming(record.id)

    async def activate_without_data(self, image_id: str, properties: dict[str, str]) -> ImageRecord:
        """See the contract."""
        for _ in range(EDIT_ATTEMPTS_MAX):
            record = await self._fetch(image_id)
            if record.status in _DONE:
                return record
            if record.status != "queued":
                raise Conflict(f"Image {image_id} is {record.status}: it cannot do without data.")
            now, merged = self._clock(), {**record.properties, **properties}
            if await image_update(self._store, msgspec.structs.replace(record, properties=merged, updated_at=now)):
                await image_switch(self._store, image_id, now=now, before="queued", after="active")
        raise Conflict(f"Image {image_id} is being changed by others.")

    async def _fetch(self, image_id: str) -> ImageRecord:
        record = await image_fetch(self._store, image_id)
        if record is None:
            await self._blobs.discard_incoming(image_id)
            raise ImageGone(image_id=image_id)
        return record


def _lock_of(image_id: str) -> str:
    """Held while the incoming file changes, and from its being taken over until the row says so."""
    return f"host-{image_id[:2]}"
