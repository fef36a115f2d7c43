"""One simulated cloud for the tests that only ask; an empty image cache would be filled by the first start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.program import Up, running


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    directory = tmp_path_factory.mktemp("cli-cloud")
    with running(directory / "state", directory / "log", "--hypervisor", "simulated", "--hosts", "2") as up:
        yield up
