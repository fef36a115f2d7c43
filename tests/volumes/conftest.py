"""A running Block Storage API, and clients of it as each role."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from instar.config import VolumeSettings
from instar.volumes.local import remove_exports, volumes_runtime
from tests.fixtures.role_clients import admin, as_role, member, other  # noqa: F401 - fixtures
from tests.volumes.volume_client import Client
from tests.volumes.volume_cloud import VolumeCloud


@pytest.fixture
def settings() -> VolumeSettings:
    return VolumeSettings()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A cloud's directory. No process and no socket of its volumes is left afterwards."""
    made = tmp_path / "cloud"
    made.mkdir()
    yield made
    remove_exports(made)
    assert not volumes_runtime(made).exists()


@pytest.fixture
async def cloud(directory: Path, settings: VolumeSettings) -> AsyncIterator[VolumeCloud]:
    cloud = VolumeCloud(directory, settings)
    await cloud.start()
    yield cloud
    await cloud.stop()


@pytest.fixture
def new_client(cloud: VolumeCloud) -> Callable[[str], Client]:
    return lambda token: Client(cloud.url, token)
