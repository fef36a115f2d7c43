"""Moves an embedded cloud's database from SQLite to PostgreSQL: `instar db copy`. Called by `database.py`.

Tables are copied in the order of their references, in parts; each part is committed with the note of how far it went, so a
copy that was killed goes on where it was. The source is only read. At the end every table is read again on both sides.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import msgspec

from instar.errors import StartupError
from instar.settings_reading import without_password
from instar.store.migrations import all_migrations
from instar.store.postgresql import PostgresqlStore

PART_ROWS = 1000
LOCK = 0x1A57A13  # of the advisory lock: one copy at a time
_NOTES = """CREATE TABLE IF NOT EXISTS store_copy (
    source TEXT NOT NULL, name TEXT NOT NULL, last BIGINT NOT NULL, done BOOLEAN NOT NULL, PRIMARY KEY (source, name))"""
OF_THE_STORE = frozenset({"migrations", "store_sessions", "store_copy"})


class Table(NamedTuple):
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]


class Copied(NamedTuple):
    table: str
    rows: int
    checksum: str  # SHA-256 of all rows, in the order of their keys; the same on both sides


class Source:
    """The SQLite database, read-only. Raises StartupError: not there, or of another version."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StartupError(f"There is no database {path}.")
        try:
            self._connection = sqlite3.connect(f"file:{path.absolute()}?mode=ro", uri=True, isolation_level=None)
            self._connection.execute("BEGIN")
            (found,) = self._connection.execute("SELECT MAX(number) FROM migrations").fetchone()
        except sqlite3.Error as error:
            raise StartupError(f"The database {path} cannot be read: {error}.") from error
        newest = all_migrations()[-1].number
        if found != newest:
            raise StartupError(
                f"The database {path} has schema {found}, this version of Instar has {newest}: start the cloud once "
                "with this version (`instar up`), stop it, and copy then."
            )

    def close(self) -> None:
        self._connection.close()

    def tables(self) -> list[Table]:
        """All but the store's own, those first that others refer to."""
        names = [
            name
            for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
            if not name.startswith("sqlite_") and name not in OF_THE_STORE
        ]
        ordered: list[str] = []

        def visit(name: str) -> None:
            if name in ordered:
                return
            for row in self._connection.execute(f'PRAGMA foreign_key_list("{name}")'):
                if row[2] != name:
                    visit(row[2])
            ordered.append(name)

        for name in names:
            visit(name)
        return [self._table(name) for name in ordered]

    def _table(self, name: str) -> Table:
        info = self._connection.execute(f'PRAGMA table_info("{name}")').fetchall()
        key = tuple(row[1] for row in sorted(info, key=lambda row: row[5]) if row[5])
        return Table(name, tuple(row[1] for row in info), key)

    def part(self, table: Table, after: int) -> list[tuple[Any, ...]]:
        """Rows behind `after`, each led by its place."""
        sql = f'SELECT rowid, {_names(table.columns)} FROM "{table.name}" WHERE rowid > ? ORDER BY rowid LIMIT ?'  # noqa: S608
        return self._connection.execute(sql, (after, PART_ROWS)).fetchall()

    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        yield from self._connection.execute(_in_order(table))


async def copy_database(source: Source, source_name: str, url: str, progress: Callable[[str], None]) -> list[Copied]:
    """Everything of the source into the empty database, verified. Raises StartupError."""
    store = PostgresqlStore(url, application="instar db copy")
    await store.open()  # which migrates
    await store.close()
    try:
        target = await asyncpg.connect(url, target_session_attrs="read-write")
    except (OSError, asyncpg.PostgresError) as error:
        raise StartupError(f"The database {without_password(url)} cannot be reached: {error}.") from None
    try:
        if not await target.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
            raise StartupError("Another copy into this database is at work.")
        tables = source.tables()
        await target.execute(_NOTES)
        await _check_target(target, source_name, tables)
        for table in tables:
            await _copy_table(source, source_name, target, table, progress)
        copied = [await _compare(source, target, table) for table in tables]
        await target.execute("ANALYZE")
        return copied
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartupError(f"The copy broke off: {error}. Run it again, it goes on where it was.") from None
    finally:
        await target.close(timeout=5)


async def _check_target(target: asyncpg.Connection, source_name: str, tables: list[Table]) -> None:
    """Empty, or the unfinished copy of this very source."""
    begun = {row["source"] for row in await target.fetch("SELECT DISTINCT source FROM store_copy")}
    if begun == {source_name}:
        return
    if begun:
        raise StartupError("The target has a copy of another database in it: make an empty one.")
    for table in tables:
        if await target.fetchval(f'SELECT EXISTS (SELECT 1 FROM "{table.name}")'):  # noqa: S608 - from our own schema
            raise StartupError(f"The target has data of its own (table {table.name}): make an empty database.")


async def _copy_table(
    source: Source, source_name: str, target: asyncpg.Connection, table: Table, progress: Callable[[str], None]
) -> None:
    asked = "SELECT last, done FROM store_copy WHERE source = $1 AND name = $2"
    note = await target.fetchrow(asked, source_name, table.name)
    last, done = (note["last"], note["done"]) if note else (-(1 << 62), False)
    rows = 0
    while not done:
        part = source.part(table, last)
        done = len(part) < PART_ROWS
        last = part[-1][0] if part else last
        async with target.transaction():
            await target.copy_records_to_table(table.name, records=[row[1:] for row in part], columns=table.columns)
            await target.execute(
                """INSERT INTO store_copy VALUES ($1, $2, $3, $4)
                   ON CONFLICT (source, name) DO UPDATE SET last = excluded.last, done = excluded.done""",
                source_name, table.name, last, done,
            )  # fmt: skip
        rows += len(part)
    if rows:
        progress(f"{table.name}: {rows} rows")


async def _compare(source: Source, target: asyncpg.Connection, table: Table) -> Copied:
    here, there = _Sum(), _Sum()
    for row in source.rows(table):
        here.add(row)
    async for row in _target_rows(target, table):
        there.add(row)
    if here.result != there.result:
        raise StartupError(
            f"Table {table.name} is not the same on both sides ({here.result[0]} and {there.result[0]} rows): was the "
            "target used meanwhile? Make an empty database and copy again."
        )
    return Copied(table.name, *here.result)


async def _target_rows(target: asyncpg.Connection, table: Table) -> AsyncIterator[tuple[Any, ...]]:
    async with target.transaction(isolation="repeatable_read", readonly=True):
        async for record in target.cursor(_in_order(table), prefetch=PART_ROWS):
            yield tuple(record)


class _Sum:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._rows = 0

    def add(self, row: tuple[Any, ...]) -> None:
        self._hash.update(msgspec.msgpack.encode(row))
        self._rows += 1

    @property
    def result(self) -> tuple[int, str]:
        return self._rows, self._hash.hexdigest()


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _in_order(table: Table) -> str:
    return f'SELECT {_names(table.columns)} FROM "{table.name}" ORDER BY {_names(table.key or table.columns)}'  # noqa: S608
