"""The image service as the volume service needs it: rooms beside each other do not know each other, the program does."""

from __future__ import annotations

from pathlib import Path

from instar.errors import Conflict, NotFound
from instar.images.contract import Image
from instar.images.fields import Caller
from instar.images.local import LocalImages
from instar.model.guest import ImageSource

_SYSTEM = Caller("", is_admin=True)


class ImagesForVolumes:
    """Implements `VolumeImages` of instar.volumes over the embedded image service."""

    def __init__(self, images: LocalImages) -> None:
        self._images = images

    async def image_fetch(self, image_id: str, *, project_id: str, is_admin: bool) -> Image:
        return await self._images.image_fetch(image_id, project_id=project_id, is_admin=is_admin)

    async def image_source(self, image_id: str) -> ImageSource:
        return await self._images.image_file(image_id)  # whoever owns volumes sees the image directory

    async def image_new(
        self, name: str, *, project_id: str, is_admin: bool, disk_format: str, visibility: str, protected: bool,
        min_disk_gib: int, min_ram_mib: int, properties: dict[str, str],
    ) -> str:  # fmt: skip
        fields = {
            "name": name, "disk_format": disk_format, "container_format": "bare", "visibility": visibility,
            "protected": protected, "min_disk": min_disk_gib, "min_ram": min_ram_mib,
        }  # fmt: skip
        return (await self._images.create(properties | fields, Caller(project_id, is_admin))).id

    async def image_drop(self, image_id: str) -> None:
        try:
            image = await self._images.fetch(image_id, _SYSTEM)
        except NotFound:
            return
        if image.status != "active":
            await self._images.discard(image_id)

    async def image_fill(self, image_id: str, data: Path) -> None:
        try:
            await self._images.upload(image_id, self._images.blobs.read_file(data), _SYSTEM)
        except Conflict:
            if (await self._images.fetch(image_id, _SYSTEM)).status != "active":
                raise
