"""Two who would keep the same cloud of many processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.cli.distributed import local_cloud
from instar.cli.distributed.layout import Layout
from instar.cli.distributed.local_cloud import LocalCloud
from instar.config import Settings
from instar.errors import StartupError


class Enough(Exception):
    """The first one need not come further."""


def cloud_in(directory: Path) -> LocalCloud:
    return LocalCloud(directory, Layout(libvirt_hosts=0), say=lambda _text: None)


def test_a_second_one_in_the_same_directory_is_refused_and_ends_nothing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = cloud_in(tmp_path / "state"), cloud_in(tmp_path / "state")
    ended: list[LocalCloud] = []

    def while_the_first_starts(cloud: LocalCloud) -> Settings:
        assert cloud is first
        with pytest.raises(StartupError, match="Another process"):
            second.start()
        assert ended == []
        raise Enough

    monkeypatch.setattr(local_cloud, "ALONE_MAX_S", 0.1)
    monkeypatch.setattr(LocalCloud, "_start_servers", while_the_first_starts)
    monkeypatch.setattr(LocalCloud, "_stop_processes", lambda cloud: ended.append(cloud))
    with pytest.raises(Enough):
        first.start()
    assert ended == [first]
    ended.clear()
    with pytest.raises(Enough):
        first.start()  # whoever comes after it has the directory
