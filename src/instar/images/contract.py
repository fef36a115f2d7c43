"""What the lifecycle needs of images. Implemented by `local.py`; a real Glance will be another implementation."""

from __future__ import annotations

from typing import Protocol

import msgspec

from instar.model.guest import ImageSource


class Image(msgspec.Struct, frozen=True):
    """An image as the lifecycle sees it. `status` queued|saving|active|deactivated|deleted…; sizes are 0 until known."""

    id: str
    name: str
    status: str
    owner: str | None
    visibility: str
    disk_format: str
    min_disk_gib: int
    min_ram_mib: int
    size_bytes: int
    virtual_size_bytes: int
    properties: dict[str, str]


class ImageDraft(msgspec.Struct, frozen=True):
    """An image that an operation is about to make of an instance. `project_id` will own it.

    `properties` are the Image API's (instance_uuid, base_image_ref, image_type, backup_type …), the caller gives all of
    them; instance_uuid says of which instance it is, also to `backups_of` and `unfinished`."""

    name: str
    project_id: str
    properties: dict[str, str]
    min_disk_gib: int = 0
    min_ram_mib: int = 0
    disk_format: str = "qcow2"
    visibility: str = "private"


class ImageService(Protocol):
    # --- images that there are ----------------------------------------------------------------------------------------

    async def image_fetch(self, image_id: str, *, project_id: str, is_admin: bool) -> Image:
        """Raises NotFound where it does not exist or this project may not see it."""
        ...

    async def image_source(self, image_id: str) -> ImageSource:
        """Where a host gets the data. Of what a host has just written the SHA-256 may still have to be found: that takes as
        long as the image is read. Raises ImageGone where there is none (any more), HypervisorError (cannot be read)."""
        ...

    # --- images that an operation makes of an instance ----------------------------------------------------------------
    # In this order: queue, upload_target, a host writes, finish_upload; or activate_without_data after queue; or, from
    # anywhere, discard. All may come twice.

    async def queue(self, image_id: str, draft: ImageDraft) -> None:
        """There is an image of status queued under this id, which the caller made up. Nothing happens when it was queued
        before. Raises BadRequest (a name or property that no image may have), Conflict (somebody else's id)."""
        ...

    async def upload_target(self, image_id: str) -> str:
        """The URL where a host writes the data; the image is saving from now on, also over a crash.

        file: is a path on this machine, the same at every call, where nothing stands yet or what an earlier attempt
        left. The host writes to `<path>.<something>` beside it and renames it when it is whole: such files are removed
        when the image is finished or discarded. Raises ImageGone, Conflict (it has data, or a client sends some)."""
        ...

    async def finish_upload(self, image_id: str) -> Image:
        """The host has written the data: it is on the disk, inspected like any upload, and the image is active; its hashes
        are found afterwards. One that is active already is returned. Raises ImageGone, TooLarge, UnsupportedMedia,
        ImageUnusable, HypervisorError (there is no file, or it is still written to); the image stays saving then, for
        another try or `discard`."""
        ...

    async def activate_without_data(self, image_id: str, properties: dict[str, str]) -> Image:
        """The queued image is active, has these properties and no data: what it says is in its properties (of an instance
        that is booted from a volume: the snapshots). Again: nothing. Raises ImageGone, Conflict (it has data, or gets
        some), BadRequest (a property that no image may have)."""
        ...

    async def discard(self, image_id: str) -> None:
        """There is no such image (any more) in whatever state, protected or not, and nothing of its data."""
        ...

    async def backups_of(self, instance_id: str, backup_type: str) -> list[str]:
        """Ids of the active backups of this type that `queue` began for the instance, newest first."""
        ...

    async def unfinished(self) -> dict[str, str]:
        """Image id → instance id of what `queue` began and is neither active nor gone: each needs an operation."""
        ...
