"""Fixtures of the hypervisor tests. A new implementation is one more name in `IMPLEMENTATIONS`."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from .harness import Harness
from .libvirt_harness import LibvirtHarness
from .simulated_harness import SimulatedHarness

IMPLEMENTATIONS = [pytest.param("libvirt", marks=pytest.mark.host), pytest.param("simulated")]

HarnessFactory = Callable[[], Awaitable[Harness]]


@pytest.fixture(scope="session")
def private_daemon() -> Iterator[PrivateDaemon]:
    """One private libvirtd for the whole session, stopped with all its guests in every case."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    directory = Path(tempfile.mkdtemp(prefix="instar-libvirtd-"))
    daemon = PrivateDaemon(directory)
    try:
        asyncio.run(daemon.ensure_running())
        yield daemon
    finally:
        asyncio.run(daemon.ensure_stopped())
        shutil.rmtree(directory)


@pytest.fixture(params=IMPLEMENTATIONS)
async def hypervisor_factory(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[HarnessFactory]:
    """Makes open hosts of the implementation under test; closes and cleans them afterwards."""
    opened: list[Harness] = []

    async def make() -> Harness:
        harness: Harness
        if request.param == "libvirt":
            daemon: PrivateDaemon = request.getfixturevalue("private_daemon")
            harness = await LibvirtHarness.opened(daemon, tmp_path / f"host{len(opened)}")
        elif request.param == "simulated":
            harness = await SimulatedHarness.opened(tmp_path / f"host{len(opened)}")
        else:
            raise AssertionError(f"no harness for {request.param}")
        opened.append(harness)
        return harness

    try:
        yield make
    finally:
        for harness in opened:
            await harness.close()


@pytest.fixture
async def host(hypervisor_factory: HarnessFactory) -> Harness:
    """One open host of the implementation under test."""
    return await hypervisor_factory()
