"""What tests of trouble begin with: an image, and a control plane on three simulated hosts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.lifecycle.harness import Plane, prepared


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


@pytest.fixture
async def one(tmp_path: Path, image_file: Path) -> AsyncIterator[Plane]:
    async with prepared(tmp_path / "cloud", image_file) as made:
        yield made
