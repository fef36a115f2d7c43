"""INSTAR_TEST_DATABASE=postgresql: each test that opens SQLite opens PostgreSQL instead, and so do the programs it starts.

A database file's path stands for a database of the private server, so that stores with one path share one database, as
they do with SQLite. Installed by conftest.py before any test module is imported, and in other programs by
fixtures/started_programs. What is about SQLite itself stays with SQLite.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from pathlib import Path
from types import ModuleType

import asyncpg
import msgspec

from instar.store.postgresql import PostgresqlStore
from tests.postgresql_server import PATIENT, SERVER, TEMPLATE, TestServer

# Folders and files of tests that are left out.
STAYS = ("store", "cli", "upgrade", "lifecycle/test_startup_trouble.py")
SETTINGS = msgspec.structs.replace(PATIENT, connections=4)  # of each store; a test may have many
STARTED_PROGRAMS = Path(__file__).parent / "fixtures" / "started_programs"
_server: TestServer | None = None


def asked_for() -> bool:
    return os.environ.get("INSTAR_TEST_DATABASE") == "postgresql"


def install(sqlite: ModuleType) -> None:
    """In the place of its store."""
    sqlite.SqliteStore = _InPlaceOfSqlite  # type: ignore[attr-defined]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    ours = [str(STARTED_PROGRAMS), str(Path(__file__).parents[1])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*ours, *(one for one in inherited if one and one not in ours)])


def the_server() -> TestServer:
    """One for the whole test process."""
    global _server
    if _server is None:
        _server = TestServer()
        atexit.register(_server.close)
    return _server


class _InPlaceOfSqlite(PostgresqlStore):
    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self._name = "f" + hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]
        super().__init__(f"{os.environ[SERVER]}/{self._name}", SETTINGS)

    async def open(self) -> None:
        connection = await asyncpg.connect(f"{os.environ[SERVER]}/postgres")
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", self._name):
                await connection.execute(f"CREATE DATABASE {self._name} TEMPLATE {TEMPLATE}")
        except asyncpg.DuplicateDatabaseError:
            pass  # another process was first
        finally:
            await connection.close()
        await super().open()
