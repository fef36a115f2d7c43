"""The fence: what a host remembers of epochs survives its agent, a torn line, and many instances."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.agent import fence as fence_module
from instar.agent.fence import Fence
from instar.errors import StaleEpoch


def opened(path: Path) -> Fence:
    fence = Fence(path)
    fence.open()
    return fence


def test_last_line_torn_by_a_crash_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "fences"
    fence = opened(path)
    fence.check("h", "one", 7)
    fence.check("h", "two", 12)
    fence.close()
    for torn in ("h tw", "h", "h two ", "h two 1", "\x00\x00\x00", "h two x"):
        text = path.read_text()
        path.write_text(text + torn)
        fence = opened(path)
        for instance_id, epoch in (("one", 7), ("two", 12)):
            fence.check("h", instance_id, epoch)
            with pytest.raises(StaleEpoch):
                fence.check("h", instance_id, epoch - 1)
        fence.close()
        assert all(len(line.split()) == 3 for line in path.read_text().splitlines() if "\x00" not in line)


def test_hosts_are_fenced_apart(tmp_path: Path) -> None:
    fence = opened(tmp_path / "fences")
    fence.check("h1", "i", 9)
    fence.check("h2", "i", 3)
    with pytest.raises(StaleEpoch):
        fence.check("h1", "i", 3)
    fence.close()


def test_no_more_than_the_bound_is_remembered_and_the_file_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was made short only when the agent started: one that runs for years filled the disk, line by line."""
    monkeypatch.setattr(fence_module, "REMEMBERED_MAX", 10)
    path = tmp_path / "fences"
    fence = opened(path)
    for epoch in range(1, 101):
        fence.check("h", f"instance-{epoch % 30}", epoch)
        assert len(path.read_text().splitlines()) <= 21
    fence.close()
    fence = opened(path)
    assert len(path.read_text().splitlines()) == 10
    with pytest.raises(StaleEpoch):
        fence.check("h", "instance-10", 99)
    fence.check("h", "instance-11", 1)  # longest without a command: forgotten
    fence.close()


def test_fence_without_a_file_works_in_memory() -> None:
    fence = Fence(None)
    fence.open()
    fence.check("h", "i", 2)
    with pytest.raises(StaleEpoch):
        fence.check("h", "i", 1)
    fence.close()
