"""A control plane that cannot start says why, and closes again what it had opened."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from instar.errors import StartupError
from tests.lifecycle.harness import Plane, plane


async def refusal(directory: Path) -> str:
    threads = threading.active_count()
    one = Plane(directory)
    with pytest.raises(StartupError) as refused:
        await one.control.open()
    one.world.close()
    writers = [thread.name for thread in threading.enumerate() if thread.name.startswith("sqlite-write")]
    assert writers == [], f"left running ({threads} threads before)"
    assert str(directory) not in refused.value.message
    return refused.value.message


async def test_database_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "instar.db").mkdir()
    assert "instar.db cannot be used: Is a directory." in await refusal(tmp_path)


async def test_database_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "instar.db").write_bytes(b"this is not a database " * 100)
    assert "instar.db cannot be used: file is not a database" in await refusal(tmp_path)


async def test_database_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    async with plane(tmp_path):
        pass
    path = tmp_path / "instar.db"
    path.write_bytes(path.read_bytes()[:5000])
    assert "instar.db cannot be used: " in await refusal(tmp_path)


async def test_database_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    async with plane(tmp_path):
        pass
    connection = sqlite3.connect(tmp_path / "instar.db")
    connection.execute("INSERT INTO migrations VALUES (999, 'from the future')")
    connection.commit()
    connection.close()
    message = await refusal(tmp_path)
    assert "The database has schema 999, this version of Instar knows schema" in message
    assert "start the newer version, or restore a backup" in message


async def test_read_only_database_is_refused(tmp_path: Path) -> None:
    """Root may write to every file, whatever its mode; a database whose header says that only a newer SQLite may write to
    it is read-only to everybody."""
    async with plane(tmp_path):
        pass
    path = tmp_path / "instar.db"
    header = bytearray(path.read_bytes())
    header[18] = 3  # file format write version: what is above 2 is read-only, see sqlite.org/fileformat.html
    path.write_bytes(header)
    assert "instar.db cannot be used: " in await refusal(tmp_path)


async def test_start_after_a_refusal_works_when_its_reason_is_gone(tmp_path: Path) -> None:
    (tmp_path / "instar.db").mkdir()
    await refusal(tmp_path)
    (tmp_path / "instar.db").rmdir()
    async with plane(tmp_path) as one:
        assert await one.findings() == []
