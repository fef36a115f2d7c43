"""The guest image as an image source, for tests of what only a real system in a guest can show. Built once on a machine;
that it can be built anew is tested in tests/guest_image."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path

from instar.cli.guest_image import ensure_built
from instar.images.guest.build import DISK_MIB
from instar.model.guest import ImageSource


async def linux_image(folder: Path) -> ImageSource:
    """A copy in this folder: whoever caches an image may take its file."""
    path = folder / "tiny.qcow2"
    await asyncio.to_thread(shutil.copyfile, await ensure_built(print), path)
    content = await asyncio.to_thread(path.read_bytes)
    return ImageSource("tiny", path.as_uri(), "qcow2", hashlib.sha256(content).hexdigest(), len(content), DISK_MIB << 20)
