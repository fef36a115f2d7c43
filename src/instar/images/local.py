"""The embedded image service: rows in the store, data in files below the state directory.

Called by the Image API (`api.py`) and, through `contract.py`, by the lifecycle. Several processes, on several machines too,
may share one database and one directory (setting image.directory).

An upload: a file of its own is locked by whoever writes it, the row says `saving` (whoever comes second gets a Conflict),
the data is hashed, synced and inspected, gets its final name, and one transaction makes the image active. A process that
is killed in between loses the lock: the next sweep of any process (at its start, and on a timer) removes the file and puts
the row back to `queued`. Files without a row that uses them are swept, too. What hosts write for snapshots and the like
belongs to operations, not to processes: `instance_images.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import structlog

from instar.clock import now_us
from instar.config import ImageSettings
from instar.errors import BadRequest, Conflict, Forbidden, ImageGone, InstarError, NotFound, StartupError, TooLarge
from instar.images.blobs import Blobs, Incoming, Received
from instar.images.checksums import Checksums
from instar.images.contract import Image, ImageDraft
from instar.images.fields import TAGS_MAX, Caller, new_image, tag_of, with_field
from instar.images.instance_images import InstanceImages
from instar.images.naming import Naming
from instar.images.patch import Change, apply_changes
from instar.images.reach import GET, KEY_NAME, PUT, SignedUrls
from instar.images.sharing import ImageMembers
from instar.images.storing import Storing
from instar.model.guest import ImageSource
from instar.store.cloud_keys import cloud_key
from instar.store.contract import Store
from instar.store.image_queries import ImageQuery, image_list
from instar.store.images import (
    ImageRecord,
    image_data_names,
    image_delete,
    image_fetch,
    image_fetch_registered,
    image_insert,
    image_member_fetch,
    image_switch,
    image_unnamed,
    image_update,
    image_upload_abort,
    image_upload_begin,
    image_uploads_open,
)
from instar.store.instance_images import (
    instance_image_all_saving,
    instance_image_backups,
    instance_image_unfinished,
)

log = structlog.get_logger()

SEEN_FOR_S = 1.0  # data that was there is not looked for again by the next builds from it
SEEN_MAX = 1000
EDIT_ATTEMPTS_MAX = 5  # edits of one image at the same moment that are put after each other before one is refused


class Download(NamedTuple):
    """An image's data, open for reading; whoever gets it closes `file` (`Blobs.stream` does)."""

    image: ImageRecord
    file: BinaryIO
    size_bytes: int


class LocalImages:
    """Implements `ImageService`. Call `open` before anything else; `clock` gives microseconds since the epoch."""

    participant = "image"  # in the journal of operations

    def __init__(
        self, store: Store, state_dir: Path, settings: ImageSettings, *, clock: Callable[[], int] = now_us
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._system = Caller("", is_admin=True)
        self.blobs = Blobs(Path(settings.directory) if settings.directory else state_dir / "images")
        self.urls: SignedUrls | None = None  # where hosts do not see the directory
        self.members = ImageMembers(store, clock)
        self._checksums = Checksums(store, self.blobs)
        self._naming = Naming(store, self.blobs)
        self._sweeper: asyncio.Task[None] | None = None
        self._seen: dict[str, float] = {}  # data by its hash, when it was there
        self._storing = Storing(store, self.blobs, settings, clock)
        self._made = InstanceImages(
            store, self.blobs, self._storing, size_max_bytes=settings.size_max_bytes, clock=clock,
            taken_over=self._naming.read_early,
        )  # fmt: skip

    @property
    def size_max_bytes(self) -> int:
        """The largest image file that is accepted."""
        return self._settings.size_max_bytes

    async def open(self) -> None:
        """Make the directory, and remove what killed processes have left in it."""
        settings = self._settings
        if settings.reach == "http":
            if not settings.reach_url:
                raise StartupError("image.reach is http: image.reach_url must say where hosts reach the API.")
            self.urls = SignedUrls(
                settings.reach_url, await cloud_key(self._store, KEY_NAME), settings.url_lifetime_s, self._clock_s
            )
        await self.blobs.prepare()
        await self.sweep()
        self._checksums.open()
        self._sweeper = asyncio.create_task(self._sweep_on_timer(), name="image-sweep")

    def _clock_s(self) -> float:
        return self._clock() / 1_000_000

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])
        await self._naming.close()
        await self._checksums.close()
        await self.blobs.close()

    async def sweep(self) -> None:
        """Uploads whose writer is dead are queued again; files that no row and no living process needs are removed; and
        checksums that a dead process did not get to are looked for."""
        uploads = await image_uploads_open(self._store)
        dead = [upload_id for upload_id in uploads if not await self.blobs.is_written(upload_id)]
        for upload_id in dead:  # one that has come to its end since is no longer saving, and stays as it is
            await image_upload_abort(self._store, upload_id, now=self._clock())
        # Files are looked at before the rows: what is begun after that has its row first, or is locked.
        stored, incoming = await self.blobs.listing()
        saving = await instance_image_all_saving(self._store)
        kept = saving | await image_unnamed(self._store)  # in this order: from the one to the other they go
        used = await image_data_names(self._store)  # and then here
        unused = {name for name in incoming if name.partition(".")[0] not in kept}
        removed = await self.blobs.remove_unwritten(unused)
        for sha256 in stored - used:
            removed += await self._storing.remove_unused(sha256)
        if removed or dead:
            log.info("images.cleaned", files=removed, uploads=len(dead))
        await self._naming.begin_all()
        self._checksums.want()

    async def _sweep_on_timer(self) -> None:
        while True:
            await asyncio.sleep(self._settings.sweep_s)
            try:
                await self.sweep()
            except (InstarError, OSError) as error:
                log.warning("images.sweep_later", error=type(error).__name__)

    # --- what the lifecycle needs -------------------------------------------------------------------------------------

    async def image_fetch(self, image_id: str, *, project_id: str, is_admin: bool) -> Image:
        record = await self.fetch(image_id, Caller(project_id, is_admin))
        return _image(record)

    async def image_source(self, image_id: str) -> ImageSource:
        source = await self.image_file(image_id)
        if self.urls is None:
            return source
        return msgspec.structs.replace(source, location=self.urls.url(GET, image_id))

    async def image_file(self, image_id: str) -> ImageSource:
        """The same for who sees the image directory, whatever hosts do. Raises ImageGone."""
        record = await self._named(image_id)
        if record is None or record.status != "active" or record.sha256 is None:
            raise ImageGone(image_id=image_id)
        try:
            await self._see(record.sha256)
        except FileNotFoundError as error:
            log.error("image.data_lost", image_id=image_id, sha256=record.sha256)
            raise ImageGone(image_id=image_id) from error
        return ImageSource(
            id=record.id,
            location=self.blobs.path(record.sha256).as_uri(),
            format=record.disk_format or "raw",
            sha256=record.sha256,
            size_bytes=record.size_bytes or 0,
            virtual_size_bytes=record.virtual_size_bytes or 0,
        )

    async def _see(self, sha256: str) -> None:
        """Raises FileNotFoundError for data that is not there: a host would find that out later, and say it worse."""
        if time.monotonic() - self._seen.get(sha256, float("-inf")) < SEEN_FOR_S:
            return
        (await self.blobs.open_data(sha256)).close()
        if len(self._seen) >= SEEN_MAX:
            self._seen.clear()
        self._seen[sha256] = time.monotonic()

    async def queue(self, image_id: str, draft: ImageDraft) -> None:
        await self._made.queue(image_id, draft)

    async def upload_target(self, image_id: str) -> str:
        target = await self._made.upload_target(image_id)
        return target if self.urls is None else self.urls.url(PUT, image_id)

    async def receive_from_host(self, image_id: str, chunks: AsyncIterator[bytes], size_bytes: int) -> None:
        """A host sends what `upload_target` asked for. Raises ImageGone, BadRequest, TooLarge."""
        await self._made.receive(image_id, chunks, size_bytes)

    async def finish_upload(self, image_id: str) -> Image:
        try:
            record = await self._made.finish_upload(image_id)
        except BaseException:
            self._naming.forget_early(image_id)
            raise
        naming = self._naming.begin(image_id)
        naming.add_done_callback(lambda _done: self._checksums.want())
        return _image(record)

    async def activate_without_data(self, image_id: str, properties: dict[str, str]) -> Image:
        return _image(await self._made.activate_without_data(image_id, properties))

    async def discard(self, image_id: str) -> None:
        await self._storing.ensure_removed(image_id)
        await self._naming.give_up(image_id)

    async def backups_of(self, instance_id: str, backup_type: str) -> list[str]:
        return await instance_image_backups(self._store, instance_id, backup_type)

    async def unfinished(self) -> dict[str, str]:
        return await instance_image_unfinished(self._store)

    async def register(
        self, name: str, path: Path, *, disk_format: str, properties: dict[str, str], visibility: str = "public"
    ) -> ImageRecord:
        """An image made of a file of this machine, of no project. The same name and content again: the one that is there.

        Raises what `upload` raises, and BadRequest for the properties."""
        upload_id = str(uuid.uuid4())
        async with self.blobs.locks.hold("register"), self.blobs.writing(upload_id) as incoming:
            received = await self._receive(incoming, self.blobs.read_file(path))
            for record in await image_fetch_registered(self._store, name):
                if (record.sha256, record.status) == (received.sha256, "active"):
                    return record
                if record.status == "queued":  # of a start that was killed right here
                    await image_delete(self._store, record.id, now=self._clock())
            fields = {"name": name, "disk_format": disk_format, "container_format": "bare", "visibility": visibility}
            record = new_image(fields | properties, self._system, self._clock())
            record = msgspec.structs.replace(record, owner=None)
            await image_insert(self._store, record)
            await image_upload_begin(self._store, record.id, upload_id, revision=0, now=self._clock())
            try:
                await self._storing.keep(record, upload_id, received)
            except BaseException:
                await image_delete(self._store, record.id, now=self._clock())
                raise
        return await self.fetch(record.id, self._system)

    # --- images -------------------------------------------------------------------------------------------------------

    async def fetch(self, image_id: str, caller: Caller) -> ImageRecord:
        """The image, when the caller may see it. Raises NotFound."""
        record = await image_fetch(self._store, image_id)
        if record is None or not await self._may_see(record, caller):
            raise NotFound(kind="Image", id=image_id)
        return record

    async def fetch_own(self, image_id: str, caller: Caller) -> ImageRecord:
        """The image, when the caller may change it. Raises NotFound where it cannot even be seen, else Forbidden."""
        record = await self.fetch(image_id, caller)
        if not (caller.is_admin or record.owner == caller.project_id):
            raise Forbidden(f"You are not permitted to change image {image_id}.")
        return record

    async def _may_see(self, record: ImageRecord, caller: Caller) -> bool:
        if caller.is_admin or record.owner == caller.project_id or record.visibility in ("public", "community"):
            return True
        return record.visibility == "shared" and bool(
            await image_member_fetch(self._store, record.id, caller.project_id)
        )

    async def list(self, query: ImageQuery) -> list[ImageRecord]:
        return await image_list(self._store, query)

    async def create(self, body: dict[str, Any], caller: Caller) -> ImageRecord:
        """A queued image. Raises BadRequest, Forbidden, Conflict (the id)."""
        record = new_image(body, caller, self._clock())
        await image_insert(self._store, record)
        return record

    async def update(self, image_id: str, changes: tuple[Change, ...], caller: Caller) -> ImageRecord:
        """Apply a patch. Raises NotFound, Forbidden, BadRequest, Conflict; then nothing is changed."""
        return await self._edit(image_id, caller, lambda record: apply_changes(record, changes, caller))

    async def add_tag(self, image_id: str, tag: str, caller: Caller) -> None:
        """The image has the tag. Raises BadRequest where the tag is no tag, or one too many."""
        wanted = tag_of(tag)

        def edit(record: ImageRecord) -> ImageRecord:
            if wanted in record.tags:
                return record
            if len(record.tags) >= TAGS_MAX:
                raise BadRequest(f"An image may have {TAGS_MAX} tags.")
            return with_field(record, "tags", [*record.tags, wanted], caller)

        await self._edit(image_id, caller, edit)

    async def remove_tag(self, image_id: str, tag: str, caller: Caller) -> None:
        """Raises NotFound where the image has no such tag."""

        def edit(record: ImageRecord) -> ImageRecord:
            if tag not in record.tags:
                raise NotFound(kind="Tag", id=tag)
            return with_field(record, "tags", [other for other in record.tags if other != tag], caller)

        await self._edit(image_id, caller, edit)

    async def _edit(self, image_id: str, caller: Caller, edit: Callable[[ImageRecord], ImageRecord]) -> ImageRecord:
        """Read, change, compare and swap; once more when somebody else was faster."""
        for _ in range(EDIT_ATTEMPTS_MAX):
            before = await self.fetch_own(image_id, caller)
            after = edit(before)
            if after is before:
                return before
            after = msgspec.structs.replace(after, updated_at=self._clock())
            if await image_update(self._store, after):
                return msgspec.structs.replace(after, revision=after.revision + 1)
        raise Conflict(f"Image {image_id} is being changed by others.")

    async def delete(self, image_id: str, caller: Caller) -> None:
        """The image is gone; its data, too, when no other image has the same. Raises NotFound, Forbidden."""
        record = await self.fetch_own(image_id, caller)
        if record.protected:
            raise Forbidden(f"Image {image_id} is protected and cannot be deleted.")
        try:
            await self._storing.remove(image_id)
        except Conflict:
            await self.fetch_own(image_id, caller)  # NotFound, where another delete was faster
            raise
        await self._naming.give_up(image_id)

    async def deactivate(self, image_id: str, caller: Caller) -> None:
        """Only admins can read the data from now on, and no server is built from it. Raises Forbidden by status."""
        await self._switch(image_id, caller, before="active", after="deactivated")

    async def reactivate(self, image_id: str, caller: Caller) -> None:
        await self._switch(image_id, caller, before="deactivated", after="active")

    async def _switch(self, image_id: str, caller: Caller, *, before: str, after: str) -> None:
        record = await self.fetch_own(image_id, caller)
        if record.status == after:
            return
        if not await image_switch(self._store, image_id, now=self._clock(), before=before, after=after):
            raise Forbidden(f"Image {image_id} is {record.status}: it cannot become {after}.")

    # --- data ---------------------------------------------------------------------------------------------------------

    async def upload(
        self, image_id: str, chunks: AsyncIterator[bytes], caller: Caller, *, size_bytes: int | None = None
    ) -> None:
        """Store the image's data and make it active. `size_bytes`: what the client says will come, if it says so.

        Raises NotFound, Forbidden, Conflict (not queued), BadRequest, TooLarge, UnsupportedMedia, ImageUnusable; the
        image is queued again then."""
        record = await self.fetch_own(image_id, caller)
        if record.disk_format is None or record.container_format is None:
            raise BadRequest("Properties disk_format, container_format must be set prior to saving data.")
        if size_bytes is not None and size_bytes > self._settings.size_max_bytes:
            raise TooLarge(f"The image is larger than the {self._settings.size_max_bytes} bytes allowed.")
        upload_id = str(uuid.uuid4())
        try:
            async with self.blobs.writing(upload_id) as incoming:
                await image_upload_begin(self._store, image_id, upload_id, revision=record.revision, now=self._clock())
                received = await self._receive(incoming, chunks)
                if size_bytes is not None and received.size_bytes != size_bytes:
                    raise BadRequest(f"{size_bytes} bytes were announced, but {received.size_bytes} arrived.")
                await self._storing.keep(record, upload_id, received)
        except BaseException:
            # After the file is gone: whoever sees the image queued finds nothing of the attempt. No-op where none began.
            await image_upload_abort(self._store, upload_id, now=self._clock())
            raise

    async def _receive(self, incoming: Incoming, chunks: AsyncIterator[bytes]) -> Received:
        return await incoming.receive(chunks, size_max_bytes=self._settings.size_max_bytes)

    async def open_data(self, image_id: str, caller: Caller) -> Download | None:
        """The image's data, None where it has none yet. Raises NotFound, Forbidden (deactivated, and no admin)."""
        record = await self.fetch(image_id, caller)
        if record.status == "deactivated" and not caller.is_admin:
            raise Forbidden(f"Image {image_id} is deactivated.")
        if record.size_bytes is None:
            return None
        try:
            file = await self._open(record)
        except FileNotFoundError as error:
            raise NotFound(kind="Data of image", id=image_id) from error
        return Download(record, file, record.size_bytes)

    async def _open(self, record: ImageRecord) -> BinaryIO:
        """Raises FileNotFoundError."""
        if record.sha256 is None:
            with contextlib.suppress(FileNotFoundError):
                return await self.blobs.open_incoming(record.id)
            named = await self._named(record.id)  # it got its name meanwhile
            record = named if named is not None else record
        return await self.blobs.open_data(record.sha256 or "")

    async def _named(self, image_id: str) -> ImageRecord | None:
        """The image with the SHA-256 of its data, if it has some; None where there is no such image."""
        record = await image_fetch(self._store, image_id)
        if record is None or record.size_bytes is None or record.sha256 is not None:
            return record
        await self._naming.named(image_id)
        return await image_fetch(self._store, image_id)


def _image(record: ImageRecord) -> Image:
    return Image(
        id=record.id,
        name=record.name or "",
        status=record.status,
        owner=record.owner,
        visibility=record.visibility,
        disk_format=record.disk_format or "",
        min_disk_gib=record.min_disk_gib,
        min_ram_mib=record.min_ram_mib,
        size_bytes=record.size_bytes or 0,
        virtual_size_bytes=record.virtual_size_bytes or 0,
        properties=record.properties,
    )
