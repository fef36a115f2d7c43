"""A copy that is written goes to the disk meanwhile; what the disk could not take is told, on the way or at the end."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from instar.hypervisor.libvirt import write_through
from instar.hypervisor.libvirt.write_through import written_through
from tests.patience import PATIENCE_S


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that were made, in their order."""
    made: list[str] = []
    for name in ("fdatasync", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(write_through.os, name, lambda fd, name=name, real=real: (made.append(name), real(fd)))
    monkeypatch.setattr(write_through, "PAUSE_S", 0.001)
    return made


async def seen(syncs: list[str], name: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while name not in syncs:
            await asyncio.sleep(0.001)


async def test_file_that_appears_late_is_synced_while_it_grows_and_at_its_end(tmp_path: Path, syncs: list[str]) -> None:
    path = tmp_path / "copy"
    async with written_through(path):
        await asyncio.sleep(0.01)
        assert syncs == []
        path.write_bytes(b"half")
        await seen(syncs, "fdatasync")
        assert "fsync" not in syncs
    assert syncs[-1] == "fsync"


async def test_short_block_is_synced_once(tmp_path: Path, syncs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_through, "PAUSE_S", 60.0)
    async with written_through(tmp_path / "copy"):
        (tmp_path / "copy").write_bytes(b"all")
    assert syncs == ["fsync"]


async def test_error_on_the_way_is_not_lost(
    tmp_path: Path, syncs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        syncs.append("refused")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "copy").write_bytes(b"much")
    monkeypatch.setattr(write_through.os, "fdatasync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        async with written_through(tmp_path / "copy"):
            await seen(syncs, "refused")
    assert caught.value.errno == errno.ENOSPC


async def test_no_file_at_the_end_is_an_error(tmp_path: Path, syncs: list[str]) -> None:
    with pytest.raises(FileNotFoundError):
        async with written_through(tmp_path / "never"):
            pass


async def test_block_that_fails_is_not_waited_for(tmp_path: Path, syncs: list[str]) -> None:
    with pytest.raises(ValueError, match="the copy"):
        async with written_through(tmp_path / "copy"):
            raise ValueError("the copy failed")
    async with asyncio.timeout(PATIENCE_S):
        while any(thread.name == "write-through" for thread in threading.enumerate()):
            await asyncio.sleep(0.001)
