"""What volumes need of images. The program brings both together: rooms beside each other do not know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from instar.model.guest import ImageSource


class SourceImage(Protocol):
    """An image, as far as a volume cares."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def disk_format(self) -> str: ...
    @property
    def min_disk_gib(self) -> int: ...
    @property
    def min_ram_mib(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def virtual_size_bytes(self) -> int: ...
    @property
    def properties(self) -> dict[str, str]: ...


class VolumeImages(Protocol):
    async def image_fetch(self, image_id: str, *, project_id: str, is_admin: bool) -> SourceImage:
        """Raises NotFound where it does not exist or this project may not see it."""
        ...

    async def image_source(self, image_id: str) -> ImageSource:
        """Where the data is. Raises ImageGone where there is none (any more)."""
        ...

    async def image_new(
        self, name: str, *, project_id: str, is_admin: bool, disk_format: str, visibility: str, protected: bool,
        min_disk_gib: int, min_ram_mib: int, properties: dict[str, str],
    ) -> str:  # fmt: skip
        """The id of a queued image. Raises BadRequest, Forbidden (a visibility that is for admins)."""
        ...

    async def image_fill(self, image_id: str, data: Path) -> None:
        """The image has this file's content and is active. One that is active already stays as it is. Raises NotFound, and
        whatever the Image API refuses an upload for."""
        ...

    async def image_drop(self, image_id: str) -> None:
        """There is no such image any more, unless it is active. Again: nothing."""
        ...
