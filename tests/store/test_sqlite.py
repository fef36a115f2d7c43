"""What is SQLite's own: files that cannot be used, migrations, and what a crash leaves."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from instar.errors import StartupError
from instar.store.migrations import Migration
from instar.store.sqlite import SqliteStore, _migrate


async def test_a_database_of_a_newer_version_is_refused_and_both_versions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "instar.db"
    store = SqliteStore(path)
    await store.open()
    await store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO migrations VALUES (9999, 'future')")
    with pytest.raises(StartupError, match=r"schema 9999, this version of Instar knows schema \d+"):
        await SqliteStore(path).open()


async def test_a_database_that_is_marked_read_only_is_refused_also_for_root(tmp_path: Path) -> None:
    path = tmp_path / "instar.db"
    store = SqliteStore(path)
    await store.open()
    await store.close()
    path.chmod(0o400)
    with pytest.raises(StartupError, match=r"instar\.db is read-only"):
        await SqliteStore(path).open()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "instar.db"
    path.write_bytes(b"this is a text file, not a database" * 100)
    with pytest.raises(StartupError, match="not a database"):
        await SqliteStore(path).open()


async def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"instar\.db cannot be used"):
        await SqliteStore(tmp_path / "nowhere" / "instar.db").open()


async def test_opening_again_migrates_nothing_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "instar.db"
    for _ in range(2):
        store = SqliteStore(path)
        await store.open()
        rows = await store.read("SELECT COUNT(*) AS n FROM migrations")
        await store.close()
    assert rows[0]["n"] >= 1


def test_a_migration_that_fails_leaves_the_schema_as_it_was(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    connection.row_factory = sqlite3.Row
    first = Migration(1, "first", ("CREATE TABLE a (x INTEGER)",))
    broken = Migration(2, "second", ("CREATE TABLE b (x INTEGER)", "CREATE TABLE a (x INTEGER)"))
    with pytest.raises(sqlite3.Error):
        _migrate(connection, [first, broken])
    tables = {row["name"] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"migrations", "a"}
    connection.close()


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """The process is killed by itself right after the last acknowledgement; every acknowledged row is there."""
    program = f"""
import asyncio, os, signal
from pathlib import Path
from instar.store.contract import Statement
from instar.store.sqlite import SqliteStore
async def main():
    store = SqliteStore(Path({str(tmp_path / "instar.db")!r}))
    await store.open()
    put = lambda n: store.write(Statement("INSERT INTO cloud_facts VALUES (:n, 'x')", dict(n=str(n)), 1))
    await asyncio.gather(*(put(n) for n in range(300)))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, timeout=60)
    assert ended.returncode == -9, ended.stderr
    connection = sqlite3.connect(tmp_path / "instar.db")
    assert connection.execute("SELECT COUNT(*) FROM cloud_facts").fetchone()[0] == 300
    connection.close()


async def test_the_owner_alone_reads_the_database_and_its_side_files(tmp_path: Path) -> None:
    """It was made with the process's umask, in a directory that the hypervisor's processes may pass through: any user
    of the host who knew the path could read password hashes and users' data."""
    store = SqliteStore(tmp_path / "instar.db")
    await store.open()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}  # noqa: ASYNC240 - a test
    await store.close()
    assert len(modes) == 3 and set(modes.values()) == {0o600}
