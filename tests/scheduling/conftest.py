"""A small cloud for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .clouds import SmallCloud


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[SmallCloud]:
    opened = await SmallCloud.opened(tmp_path / "instar.db")
    yield opened
    await opened.store.close()
