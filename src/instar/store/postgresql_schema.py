"""The schema on PostgreSQL: our migrations with PostgreSQL's names of the types, each in one transaction.

Several processes may start at once: an advisory lock lets one of them migrate while the others wait. Called by
`postgresql.py` at each start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import asyncpg
import structlog

from instar.errors import StartupError
from instar.store.migrations import Migration, all_migrations

log = structlog.get_logger()

LOCK = 0x1A57A12  # of our advisory lock
MINIMUM_VERSION = 130_000  # of the server
# Numbers have 64 bits everywhere in Instar; texts are compared byte by byte, as SQLite does it.
_TYPES = {"INTEGER": "BIGINT", "BLOB": "BYTEA", "TEXT": 'TEXT COLLATE "C"'}
_WORD = re.compile(r"'(?:[^']|'')*'|\b(?:INTEGER|BLOB|TEXT)\b")
_DEFINES = re.compile(r"\s*(CREATE TABLE|ALTER TABLE)\b")

# Of each connection that writes, the number of its last transaction: so it can be asked whether one was committed whose
# answer was lost. `backend` and `started` say whether the connection still lives.
_SESSIONS = """CREATE TABLE IF NOT EXISTS store_sessions (
    id TEXT PRIMARY KEY, seq BIGINT NOT NULL, result TEXT NOT NULL, backend INTEGER NOT NULL,
    started TIMESTAMPTZ NOT NULL) WITH (fillfactor = 10)"""
# A connection that is gone is remembered for a while: its owner may still want to know what became of its last transaction.
_FORGET = """DELETE FROM store_sessions WHERE started < now() - interval '1 hour' AND NOT EXISTS (
    SELECT 1 FROM pg_stat_activity a WHERE a.pid = backend AND a.backend_start = started)"""


def for_postgresql(sql: str) -> str:
    """A statement of a migration with PostgreSQL's types."""
    if not _DEFINES.match(sql):
        return sql
    return _WORD.sub(lambda match: _TYPES.get(match[0], match[0]), sql)


async def migrate(connection: asyncpg.Connection, migrations: Sequence[Migration] | None = None) -> None:
    """Forward to the newest schema. Raises StartupError for a database of a newer version, or that cannot be used."""
    known = all_migrations() if migrations is None else migrations
    if connection.get_server_version() < (13,):
        raise StartupError("PostgreSQL 13 or newer is needed.")
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
        encoding = await connection.fetchval("SHOW server_encoding")
        if encoding != "UTF8":
            raise StartupError(f"The database has the encoding {encoding}; make one with UTF8.")
        await connection.execute("CREATE TABLE IF NOT EXISTS migrations (number BIGINT PRIMARY KEY, name TEXT NOT NULL)")
        await connection.execute(_SESSIONS)
        await connection.execute(_FORGET)
    newest = known[-1].number if known else 0
    for migration in known:
        await _apply(connection, migration, newest)
    await _check_newest(connection, newest)


async def check_schema(connection: asyncpg.Connection) -> None:
    """Raises StartupError where the schema is not this version's, and changes nothing."""
    newest = all_migrations()[-1].number
    if not await connection.fetchval("SELECT to_regclass('migrations') IS NOT NULL"):
        raise StartupError("The database was not prepared for a cloud: run `instar cloud init` with the same --config.")
    await _check_newest(connection, newest)
    found = await connection.fetchval("SELECT MAX(number) FROM migrations")
    if found is None or found < newest:
        raise StartupError(f"The database has schema {found}, and this version needs {newest}: run `instar cloud init`.")


async def _apply(connection: asyncpg.Connection, migration: Migration, newest: int) -> None:
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
        await _check_newest(connection, newest)
        if await connection.fetchval("SELECT 1 FROM migrations WHERE number = $1", migration.number):
            return
        for sql in migration.statements:
            await connection.execute(for_postgresql(sql))
        await connection.execute("INSERT INTO migrations VALUES ($1, $2)", migration.number, migration.name)
    log.info("store.migrated", number=migration.number, name=migration.name)


async def _check_newest(connection: asyncpg.Connection, newest: int) -> None:
    found = await connection.fetchval("SELECT MAX(number) FROM migrations")
    if found is not None and found > newest:
        raise StartupError(
            f"The database has schema {found}, this version of Instar knows schema {newest}: "
            "start the newer version, or restore a backup made before the upgrade."
        )
