"""Fixtures of the hypervisor tests. A new implementation is one more name in `IMPLEMENTATIONS`."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.hypervisor.libvirt.private_daemon import PrivateDaemon

from .apart_daemon import ApartDaemon
from .harness import Harness
from .libvirt_harness import LibvirtHarness
from .simulated_harness import SimulatedHarness

IMPLEMENTATIONS = [pytest.param("libvirt", marks=pytest.mark.host), pytest.param("simulated")]

HostOpener = Callable[[Path], Coroutine[Any, Any, Harness]]
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


@pytest.fixture(scope="session")
def two_daemons() -> Iterator[tuple[ApartDaemon, ApartDaemon]]:
    """Two private libvirtds that are two hosts to libvirt, each in a network namespace of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    directory = Path(tempfile.mkdtemp(prefix="instar-two-"))
    daemons = (ApartDaemon(directory / "first"), ApartDaemon(directory / "second"))
    try:
        for daemon in daemons:
            daemon.start()
        yield daemons
    finally:
        for daemon in daemons:
            daemon.stop()
        shutil.rmtree(directory)


@pytest.fixture(params=IMPLEMENTATIONS)
def open_host(request: pytest.FixtureRequest) -> HostOpener:
    """Opens a host of the implementation under test in a directory. A new implementation is one more branch."""
    if request.param == "libvirt":
        daemon: PrivateDaemon = request.getfixturevalue("private_daemon")
        return lambda directory: LibvirtHarness.opened(daemon, directory)
    if request.param == "simulated":
        return SimulatedHarness.opened
    raise AssertionError(f"no harness for {request.param}")


@pytest.fixture
async def hypervisor_factory(open_host: HostOpener, tmp_path: Path) -> AsyncIterator[HarnessFactory]:
    """Makes open hosts of the implementation under test; closes and cleans them afterwards."""
    opened: list[Harness] = []

    async def make() -> Harness:
        harness = await open_host(tmp_path / f"host{len(opened)}")
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
