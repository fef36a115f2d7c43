"""The image `tiny`: built once on a machine by each recipe, kept in the user's cache, registered in every cloud."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from instar.errors import InstarError
from instar.images.guest import build_guest, recipe_fingerprint
from instar.images.local import LocalImages
from instar.store.contract import Store

log = structlog.get_logger()

NAME = "tiny"
KEEP_OLD_S = 7 * 86_400
PROPERTIES = {"hw_disk_bus": "virtio", "hw_vif_model": "virtio", "os_distro": "debian", "os_type": "linux"}


def cache_dir() -> Path:
    """Where built images and their packages are kept: XDG_CACHE_HOME/instar."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "instar"


async def ensure_built(progress: Callable[[str], None]) -> Path:
    """The image's file, built when there is none by this version's recipe. Raises GuestBuildFailed."""
    path = cache_dir() / f"{NAME}-{await asyncio.to_thread(recipe_fingerprint)}.qcow2"
    if not await asyncio.to_thread(path.exists):
        progress("building the guest image (once on this machine)")
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(build_guest, path, work_dir=cache_dir() / "guest", progress=progress)
        await asyncio.to_thread(_remove_old, path)
    return path


def _remove_old(current: Path) -> None:
    """Builds by other recipes. Not recent ones: two versions of Instar on a machine would take them from each other."""
    for other in current.parent.glob(f"{NAME}*.qcow2"):
        with contextlib.suppress(OSError):
            if other != current and other.stat().st_mtime < time.time() - KEEP_OLD_S:
                other.unlink()


async def ensure_tiny(store: Store, images: LocalImages, progress: Callable[[str], None]) -> None:
    """The image `tiny` exists and is active. A machine that cannot build it has a cloud without it, and is told so."""
    rows = await store.read("SELECT id FROM images WHERE name = :name AND status = 'active'", {"name": NAME})
    if rows:
        return
    try:
        path = await ensure_built(progress)
        await images.register(NAME, path, disk_format="qcow2", properties=PROPERTIES)
    except InstarError as error:
        log.warning("image.tiny_not_built", reason=error.message)
        progress(f"the image {NAME} could not be built: {error.message}")
