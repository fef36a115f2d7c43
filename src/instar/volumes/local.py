"""The volume service of a cloud in one process: it owns the data itself. Called by the program and by tests.

How and why: docs/decisions/0011-volumes.md, 0016-volumes-of-many-processes.md.
"""

from __future__ import annotations

from pathlib import Path

from instar.config import VolumeSettings
from instar.store.contract import Store
from instar.volumes.images import VolumeImages
from instar.volumes.owner import VolumeOwner, remove_exports, volumes_runtime
from instar.volumes.service import Volumes

__all__ = ["LocalVolumes", "remove_exports", "volumes_runtime"]


class LocalVolumes(Volumes):
    """Implements `VolumeService`. Call `open` before anything else."""

    def __init__(self, store: Store, state_dir: Path, settings: VolumeSettings, images: VolumeImages) -> None:
        self.owner = VolumeOwner(store, state_dir, settings, images)
        super().__init__(store, settings, images, self.owner)

    async def open(self) -> None:
        """Take the directory over: what a killed process left is removed, done again, or served on."""
        await self.owner.open()

    async def close(self) -> None:
        """The exports go on."""
        await self.owner.close()
