"""Looks whether an image is there and is what it should be, for simulated hosts, which keep no copy of it.

One for all hosts of a world: an image file is hashed once, however many hosts fetch it. Only files are looked at;
images elsewhere are taken as good.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from instar.errors import HypervisorError, ImageGone
from instar.model.guest import ImageSource


class ImageCheck:
    def __init__(self) -> None:
        self._good: set[tuple[str, str]] = set()  # (location, sha256)
        self._one_at_a_time = asyncio.Lock()

    async def check(self, image: ImageSource) -> None:
        """Raises ImageGone when its file is not there, HypervisorError when its content has another checksum."""
        place = urlsplit(image.location)
        if place.scheme != "file":
            return
        path = Path(unquote(place.path))
        if (image.location, image.sha256) in self._good and path.exists():  # noqa: ASYNC240 - one stat, microseconds
            return
        async with self._one_at_a_time:
            try:
                sha256 = await asyncio.to_thread(_sha256, path)
            except OSError as error:
                raise ImageGone(image_id=image.id) from error
        if sha256 != image.sha256:
            raise HypervisorError(reason=f"the checksum of image {image.id} is not what it should be")
        self._good.add((image.location, image.sha256))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
