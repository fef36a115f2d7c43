"""A running Block Storage API, and clients of it as each role."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from instar.config import VolumeSettings
from instar.volumes.local import remove_exports, volumes_runtime
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
async def as_role(cloud: VolumeCloud) -> AsyncIterator[Callable[[str], Client]]:
    """`as_role("member@p1")` is a client of that role in that project."""
    clients: dict[str, Client] = {}

    def client(token: str) -> Client:
        if token not in clients:
            clients[token] = Client(cloud.url, token)
        return clients[token]

    yield client
    for one in clients.values():
        await one.close()


@pytest.fixture
def member(as_role: Callable[[str], Client]) -> Client:
    return as_role("member@p1")


@pytest.fixture
def admin(as_role: Callable[[str], Client]) -> Client:
    return as_role("admin@admins")


@pytest.fixture
def other(as_role: Callable[[str], Client]) -> Client:
    """A member of another project."""
    return as_role("member@p2")
