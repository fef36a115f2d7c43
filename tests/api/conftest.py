"""One running cloud for each test that needs one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from instar.config import LifecycleSettings, SimulatedSettings
from tests.api.compute_cloud import SETTINGS, Cloud, running_cloud


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    async with running_cloud(tmp_path) as running:
        yield running


THREE_HOSTS = msgspec.structs.replace(
    SETTINGS,
    simulated=SimulatedSettings(hosts=3),
    lifecycle=LifecycleSettings(
        wait_soft_reboot_seconds=1, shutdown_grace_s=1, shelved_offload_s=-1, reclaim_instance_interval_s=3600
    ),
)


@pytest.fixture
async def three_hosts(tmp_path: Path) -> AsyncIterator[Cloud]:
    """Room to move; shelved servers stay on their host, deleted ones can be restored."""
    async with running_cloud(tmp_path, THREE_HOSTS) as running:
        yield running
