"""A running Image API, clients of it as each role, and image files made by the real qemu-img."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from image_client import Client
from image_cloud import ImageCloud

from instar.config import ImageSettings
from tests.fixtures.role_clients import admin, as_role, member, other  # noqa: F401 - fixtures

Qemu = Callable[..., Path]


@pytest.fixture
def settings() -> ImageSettings:
    return ImageSettings()


@pytest.fixture
async def cloud(tmp_path: Path, settings: ImageSettings) -> AsyncIterator[ImageCloud]:
    (tmp_path / "cloud").mkdir()
    cloud = ImageCloud(tmp_path / "cloud", settings)
    await cloud.start()
    yield cloud
    await cloud.stop()


@pytest.fixture
def new_client(cloud: ImageCloud) -> Callable[[str], Client]:
    return lambda token: Client(cloud.url, token)


@pytest.fixture
def qemu_img(tmp_path: Path) -> Qemu:
    """`qemu_img("a.qcow2", "1M", "-f", "qcow2")` makes a file with the real program."""

    def make(name: str, size: str, *arguments: str) -> Path:
        path = tmp_path / name
        subprocess.run(
            ["qemu-img", "create", "-q", *arguments, str(path), size], check=True, cwd=tmp_path, timeout=30
        )
        return path

    return make
