"""Image and Block Storage API alone, over real HTTP with tokens that stand in a table. As a program: a cloud to kill."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program it finds the fixtures too

from instar.cli.volume_images import ImagesForVolumes
from instar.config import ImageSettings, VolumeSettings
from instar.http.app import App, build_app
from instar.http.server import HttpServer
from instar.images.api import image_api
from instar.images.local import LocalImages
from instar.store.sqlite import SqliteStore
from instar.volumes.api import volume_service
from instar.volumes.local import LocalVolumes
from tests.fixtures.token_table import TokenTable, identity_api


class VolumeCloud:
    """Store, image and volume service and HTTP server below one directory."""

    def __init__(self, directory: Path, settings: VolumeSettings | None = None) -> None:
        self.directory = directory
        self.store = SqliteStore(directory / "instar.db", durable=False)
        self.images = LocalImages(self.store, directory, ImageSettings())
        self.volumes = LocalVolumes(self.store, directory, settings or VolumeSettings(), ImagesForVolumes(self.images))
        self.app: App = build_app(
            [image_api(self.images, list_limit_max=100), volume_service(self.volumes, list_limit_max=100), identity_api()],
            TokenTable(),
            body_max_bytes=1 << 20,
        )
        self._server = HttpServer(self.app, "127.0.0.1", 0)
        self.url = ""
        self._running = False

    async def start(self) -> None:
        self._running = True
        await self.store.open()
        await self.images.open()
        await self.volumes.open()
        self.url = f"http://127.0.0.1:{await self._server.start()}"

    async def stop(self) -> None:
        """Again: nothing."""
        if not self._running:
            return
        self._running = False
        await self._server.stop(grace_s=1)
        await self.volumes.close()
        await self.images.close()
        await self.store.close()

    def files(self) -> list[str]:
        """Names of all files of volumes."""
        root = self.directory / "volumes"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def _serve(directory: Path) -> None:
    cloud = VolumeCloud(directory)
    await cloud.start()
    print(cloud.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
