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
from instar.hypervisor.simulated.records import SimulatedContent
from instar.hypervisor.simulated.snapshot_file import read_snapshot
from instar.model.guest import ImageSource


class ImageCheck:
    def __init__(self) -> None:
        self._good: dict[tuple[str, str], SimulatedContent | None] = {}  # by (location, sha256)
        self._one_at_a_time = asyncio.Lock()

    async def check(self, image: ImageSource) -> SimulatedContent | None:
        """What stands on it, where it was made of a simulated disk.

        Raises ImageGone when its file is not there, HypervisorError when its content has another checksum."""
        path = file_of(image.location)
        if path is None:
            return None
        known = (image.location, image.sha256)
        if known in self._good and path.exists():  # one stat, microseconds
            return self._good[known]
        async with self._one_at_a_time:
            try:
                sha256, content = await asyncio.to_thread(_read, path)
            except OSError as error:
                raise ImageGone(image_id=image.id) from error
        if sha256 != image.sha256:
            raise HypervisorError(reason=f"the checksum of image {image.id} is not what it should be")
        self._good[known] = content
        return content


def file_of(location: str) -> Path | None:
    """The path of a file: URL; None for a URL of another kind."""
    place = urlsplit(location)
    return Path(unquote(place.path)) if place.scheme == "file" else None


def _read(path: Path) -> tuple[str, SimulatedContent | None]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return sha256, read_snapshot(path)
