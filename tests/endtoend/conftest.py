"""Clouds for the end-to-end tests: each is a real `instar up`, and nothing of it may be left on the host."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.endtoend.host_leftovers import leftovers, marks_of, taps
from tests.endtoend.running_cloud import RunningCloud, wait_until

CloudMaker = Callable[..., RunningCloud]
LOG_SHOWN_MAX = 6000  # characters, of each cloud of a test that failed


@contextmanager
def clean_host() -> Iterator[CloudMaker]:
    """Makes clouds that are not started yet; ends them all, and then nothing of them may be left on the host."""
    directory = Path(tempfile.mkdtemp(prefix="instar-e2e-"))
    taps_before = taps()
    made: list[RunningCloud] = []
    marks = [str(directory)]

    def make(hypervisor: str, *options: str, **settings: str) -> RunningCloud:
        made.append(RunningCloud(directory / f"cloud{len(made)}", hypervisor, *options, settings=settings))
        return made[-1]

    try:
        yield make
    finally:
        try:
            for cloud in made:
                marks += marks_of(cloud.directory)
                cloud.close()
        finally:
            for cloud in made:
                print(f"--- the end of {cloud.log_path.name}\n{cloud.log()[-LOG_SHOWN_MAX:]}")
            shutil.rmtree(directory, ignore_errors=True)
    left: dict[str, set[str]] = {}

    def nothing_left() -> bool:
        left.clear()
        left.update(leftovers(tuple(marks), taps_before))
        return not left

    try:
        wait_until(nothing_left, 5)
    except AssertionError:
        raise AssertionError(f"left on the host: {left}") from None


@pytest.fixture
def make_cloud() -> Iterator[CloudMaker]:
    """Clouds of one test: `make_cloud(hypervisor, *options, SETTING=value)`, not started yet."""
    with clean_host() as make:
        yield make


@pytest.fixture(scope="module")
def simulated_cloud() -> Iterator[RunningCloud]:
    """A cloud of three simulated hosts, shared by a module's tests."""
    with clean_host() as make:
        cloud = make("simulated", "--hosts", "3")
        cloud.start()
        yield cloud
        assert cloud.admin.findings() == []
        assert cloud.terminate() == 0


@pytest.fixture(scope="module")
def libvirt_cloud() -> Iterator[RunningCloud]:
    """A cloud of real guests on this machine, shared by a module's tests."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with clean_host() as make:
        cloud = make("libvirt")
        cloud.start()
        yield cloud
        assert cloud.admin.findings() == []
        assert cloud.terminate() == 0
