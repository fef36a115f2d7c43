"""The Image API alone, served over real HTTP with tokens that stand in a table. Run as a program it is a cloud to kill."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program it finds the fixtures too

from instar.config import ImageSettings
from instar.http.app import App, build_app
from instar.http.server import HttpServer
from instar.images.api import image_api
from instar.images.local import LocalImages
from instar.store.sqlite import SqliteStore
from tests.fixtures.token_table import TokenTable, identity_api

BODY_MAX_BYTES = 1 << 20
LIST_LIMIT_MAX = 1000


class ImageCloud:
    """Store, image service and HTTP server below one directory."""

    def __init__(self, directory: Path, settings: ImageSettings | None = None) -> None:
        self.directory = directory
        self.store = SqliteStore(directory / "instar.db", durable=False)
        self.images = LocalImages(self.store, directory, settings or ImageSettings())
        self.app: App = build_app(
            [image_api(self.images, list_limit_max=LIST_LIMIT_MAX), identity_api()],
            TokenTable(),
            body_max_bytes=BODY_MAX_BYTES,
        )
        self._server = HttpServer(self.app, "127.0.0.1", 0)
        self.url = ""

    async def start(self) -> None:
        await self.store.open()
        await self.images.open()
        self.url = f"http://127.0.0.1:{await self._server.start()}"

    async def stop(self) -> None:
        await self._server.stop(grace_s=1)
        await self.images.close()
        await self.store.close()

    def files(self) -> list[str]:
        """Names of all stored and incoming data."""
        root = self.directory / "images"
        files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        return sorted(str(path) for path in files if path.parts[0] != "locks")


async def _serve(directory: Path) -> None:
    cloud = ImageCloud(directory)
    await cloud.start()
    print(cloud.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
