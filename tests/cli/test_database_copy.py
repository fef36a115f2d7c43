"""`instar db copy`: from SQLite to PostgreSQL, killed and run again, refused where it would do harm."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from click.testing import CliRunner, Result

from instar.cli import database_copy
from instar.cli.database import db
from instar.cli.state_dir import StateDir
from instar.errors import StartupError
from instar.store.contract import Statement
from instar.store.flavors import bootstrap_flavors
from instar.store.sqlite import SqliteStore
from tests.postgresql_server import TestServer

FACTS = 40


@pytest.fixture
def target(postgresql_server: TestServer) -> Iterator[str]:
    url = postgresql_server.empty_database()
    yield url
    postgresql_server.drop(url)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a cloud that was stopped: flavors (with bytes), references, NULLs, numbers of 64 bits."""

    async def fill() -> None:
        store = SqliteStore(tmp_path / "instar.db", durable=False)
        await store.open()
        await bootstrap_flavors(store)
        access = "INSERT INTO flavor_access VALUES ('1', :project)"
        fact = "INSERT INTO cloud_facts VALUES (:name, :value)"
        host = "INSERT INTO volume_types VALUES ('t', 'type', NULL, 1, :specs, :big, NULL)"
        await store.write(
            *(Statement(fact, {"name": f"ä{n}", "value": "x" * n}) for n in range(FACTS)),
            Statement(access, {"project": "p"}), Statement(host, {"specs": b"{\x00\xff}", "big": 1 << 60}),
        )  # fmt: skip
        await store.close()

    asyncio.run(fill())
    return tmp_path


def copy(directory: Path, target: str) -> Result:
    return CliRunner().invoke(db, ["copy", f"sqlite://{directory}/instar.db", target])


def query(url: str, sql: str) -> list[asyncpg.Record]:
    async def ask() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetch(sql)
        finally:
            await connection.close()

    return asyncio.run(ask())


def test_a_copy_that_is_killed_goes_on_and_has_everything_once(
    directory: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashlib.sha256((directory / "instar.db").read_bytes()).hexdigest()
    monkeypatch.setattr(database_copy, "PART_ROWS", 7)
    real, parts = asyncpg.Connection.copy_records_to_table, 0

    async def dying(self: asyncpg.Connection, *args: object, **keywords: object) -> object:
        nonlocal parts
        parts += 1
        if parts in (3, 9, 30):
            raise ConnectionResetError("killed")
        return await real(self, *args, **keywords)

    monkeypatch.setattr(asyncpg.Connection, "copy_records_to_table", dying)
    runs = 0
    while (result := copy(directory, target)).exit_code != 0:
        assert "Run it again, it goes on where it was" in str(result.exception), result.exception
        runs += 1
    assert runs == 3 and "copied and verified" in result.stdout
    rows = query(target, "SELECT name, value FROM cloud_facts WHERE name LIKE 'ä%'")
    assert {row["name"]: len(row["value"]) for row in rows} == {f"ä{n}": n for n in range(FACTS)}
    row = query(target, "SELECT * FROM volume_types")[0]
    assert (row["extra_specs"], row["created_at"], row["updated_at"]) == (b"{\x00\xff}", 1 << 60, None)
    assert hashlib.sha256((directory / "instar.db").read_bytes()).hexdigest() == before
    assert ":***@" in result.stdout and target.split(":")[2].split("@")[0] not in result.output


def test_a_target_with_data_of_its_own_is_refused(directory: Path, postgresql_url: str) -> None:
    query(postgresql_url, "INSERT INTO cloud_facts VALUES ('a', 'b')")
    result = copy(directory, postgresql_url)
    assert isinstance(result.exception, StartupError) and "has data of its own" in str(result.exception)


def test_a_target_that_was_used_after_the_copy_is_told_and_left_alone(directory: Path, target: str) -> None:
    assert copy(directory, target).exit_code == 0
    query(target, "DELETE FROM cloud_facts WHERE name = 'ä3'")
    assert "not the same on both sides" in str(copy(directory, target).exception)
    assert len(query(target, "SELECT 1 FROM cloud_facts WHERE name LIKE 'ä%'")) == FACTS - 1


def test_a_source_in_use_or_missing_is_refused(directory: Path, postgresql_url: str, tmp_path: Path) -> None:
    state = StateDir(directory)
    state.lock()
    assert "stop it" in str(copy(directory, postgresql_url).exception)
    state.unlock()
    assert "There is no database" in str(copy(tmp_path / "nowhere", postgresql_url).exception)
