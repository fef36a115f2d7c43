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


class ImageService(Protocol):
    async def image_fetch(self, image_id: str, *, project_id: str, is_admin: bool) -> Image:
        """Raises NotFound where it does not exist or this project may not see it."""
        ...

    async def image_source(self, image_id: str) -> ImageSource:
        """Where a host gets the data. Raises ImageGone where there is none (any more)."""
        ...
