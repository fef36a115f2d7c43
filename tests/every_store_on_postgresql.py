"""INSTAR_TEST_DATABASE=postgresql: each test that opens SQLite in this process opens PostgreSQL instead.

A database file's path stands for a database of the private server, so that stores with one path share one database, as
they do with SQLite. Installed by conftest.py before any test module is imported. What is about SQLite itself, and programs
that a test starts, stay with SQLite.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import os
import threading
from pathlib import Path

import instar.store.sqlite
from instar.config import PostgresqlSettings
from instar.store.postgresql import PostgresqlStore
from tests.postgresql_server import TestServer

STAYS = ("store", "cli", "upgrade")  # folders of tests that are left out
CONNECTIONS = 4  # of each store; a test may have many
_server: TestServer | None = None
_making = threading.Lock()


def asked_for() -> bool:
    return os.environ.get("INSTAR_TEST_DATABASE") == "postgresql"


def install() -> None:
    instar.store.sqlite.SqliteStore = _InPlaceOfSqlite  # type: ignore[assignment,misc]


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
        super().__init__(the_server().server.url_of(self._name), PostgresqlSettings(connections=CONNECTIONS))

    async def open(self) -> None:
        await asyncio.to_thread(_ensure, self._name)
        await super().open()


def _ensure(name: str) -> None:
    with _making:
        the_server().ensure(name)
