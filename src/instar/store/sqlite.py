"""The store on SQLite: WAL, one writer thread with group commit, a few reader threads.

Writers hand their transaction to the writer thread and wait. While one group is being committed the next gathers, so the
cost of a durable commit is shared by all that arrived meanwhile; each transaction stands in a savepoint of its own, so a
refused one takes nothing else with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from instar.errors import StartupError, Unavailable
from instar.store.contract import Duplicate, Result, Row, Statement, Value, WriteConflict
from instar.store.guard import guarded
from instar.store.migrations import Migration, all_migrations

log = structlog.get_logger()

GROUP_MAX = 128  # transactions in one commit
BUSY_TIMEOUT_MS = 5_000
READERS = 2
STATEMENT_CACHE = 512


class _Transaction(NamedTuple):
    statements: tuple[Statement, ...]
    future: asyncio.Future[list[Result]]


class _Query(NamedTuple):
    sql: str
    params: Mapping[str, Value]
    future: asyncio.Future[Sequence[Row]]


class SqliteStore:
    """`path` is the database file, in a directory that exists. `durable`: fsync at every commit."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self._path = path
        self._durable = durable
        self._queue: queue.SimpleQueue[_Transaction | None] = queue.SimpleQueue()
        # A queue of our own: an executor's futures cost the event loop more than most queries cost SQLite.
        self._queries: queue.SimpleQueue[_Query | None] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._writer: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        connection = await self._loop.run_in_executor(None, self._open_and_migrate)
        self._writer = threading.Thread(target=self._write_groups, args=(connection,), name="sqlite-write", daemon=True)
        self._writer.start()
        self._readers = [
            threading.Thread(target=self._answer_queries, name=f"sqlite-read-{number}", daemon=True)
            for number in range(READERS)
        ]
        for reader in self._readers:
            reader.start()

    async def close(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        self._queue.put(None)
        for _ in self._readers:
            self._queries.put(None)
        for thread in (writer, *self._readers):
            await asyncio.get_running_loop().run_in_executor(None, thread.join)
        self._loop = None
        self._readers.clear()

    async def read(self, sql: str, params: Mapping[str, Value] | None = None) -> Sequence[Row]:
        if self._writer is None or self._loop is None:
            raise Unavailable(retry_after_s=1)
        future: asyncio.Future[Sequence[Row]] = self._loop.create_future()
        self._queries.put(_Query(sql, params or {}, future))
        return await future

    async def write(self, *statements: Statement) -> list[Result]:
        if self._writer is None or self._loop is None:
            raise Unavailable(retry_after_s=1)
        future: asyncio.Future[list[Result]] = self._loop.create_future()
        statements, others = guarded(statements)
        self._queue.put(_Transaction(statements, future))
        # A caller that is cancelled stops waiting; its transaction is committed or refused all the same.
        results = await future
        return results[others:] if others else results

    async def end_silent(self) -> None:
        return

    # --- in the threads -------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, cached_statements=STATEMENT_CACHE
        )
        connection.row_factory = sqlite3.Row
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _open_and_migrate(self) -> sqlite3.Connection:
        try:
            # Its owner alone reads it (users' data, password hashes); SQLite gives its side files the same mode.
            os.close(os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if not self._path.stat().st_mode & stat.S_IWUSR:  # root could write all the same, but was told not to
                raise StartupError(f"The database {self._path.name} is read-only: let its owner write to it, then start.")
            connection = self._connect()
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'OFF'}")
            _migrate(connection, all_migrations())
            _check_writable(connection)
        except OSError as error:
            raise StartupError(f"The database {self._path.name} cannot be used: {error.strerror}.") from error
        except sqlite3.Error as error:
            raise StartupError(f"The database {self._path.name} cannot be used: {error}.") from error
        return connection

    def _answer_queries(self) -> None:
        """A reader thread: one query after another on its own connection, until told to end."""
        connection: sqlite3.Connection | None = None
        while (query := self._queries.get()) is not None:
            outcome: Sequence[Row] | Exception
            try:
                if connection is None:
                    connection = self._connect()
                    connection.execute("PRAGMA query_only = ON")
                outcome = connection.execute(query.sql, query.params).fetchall()
            except sqlite3.OperationalError as error:
                outcome = error
                if "locked" in str(error) or "busy" in str(error):
                    outcome = Unavailable(retry_after_s=1)
                    outcome.__cause__ = error
            except Exception as error:  # noqa: BLE001,RUF100 - handed to the caller that waits for this query
                outcome = error
            self._call_soon(_answer, query, outcome)
        if connection is not None:
            connection.close()

    def _call_soon(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *args)

    def _write_groups(self, connection: sqlite3.Connection) -> None:
        """The writer thread: commit whatever waits, as one group, until told to end."""
        ending = False
        while not ending:
            group: list[_Transaction] = []
            item = self._queue.get()
            while True:
                if item is None:
                    ending = True
                    break
                group.append(item)
                if len(group) == GROUP_MAX:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if group:
                self._commit(connection, group)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, group: list[_Transaction]) -> None:
        outcomes: list[list[Result] | Exception] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            outcomes = [_in_savepoint(connection, transaction.statements) for transaction in group]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001,RUF100 - the group as a whole failed: each of its callers is told
            log.exception("store.commit_failed", transactions=len(group))
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            outcomes = [Unavailable(retry_after_s=1) for _ in group]
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    outcome.__cause__ = error
        self._call_soon(_tell, group, outcomes)


def _answer(query: _Query, outcome: Sequence[Row] | Exception) -> None:
    if query.future.done():
        return  # whoever asked was cancelled
    if isinstance(outcome, Exception):
        query.future.set_exception(outcome)
    else:
        query.future.set_result(outcome)


def _tell(group: list[_Transaction], outcomes: list[list[Result] | Exception]) -> None:
    for transaction, outcome in zip(group, outcomes, strict=True):
        if transaction.future.done():
            continue
        if isinstance(outcome, Exception):
            transaction.future.set_exception(outcome)
        else:
            transaction.future.set_result(outcome)


def _in_savepoint(connection: sqlite3.Connection, statements: tuple[Statement, ...]) -> list[Result] | Exception:
    connection.execute("SAVEPOINT one")
    try:
        results = [_execute(connection, statement) for statement in statements]
    except sqlite3.OperationalError:
        raise  # disk full, I/O error, interrupted: nothing of this group can be trusted
    except Exception as error:  # noqa: BLE001,RUF100 - handed to the caller that waits for this transaction
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return error
    connection.execute("RELEASE one")
    return results


def _execute(connection: sqlite3.Connection, statement: Statement) -> Result:
    try:
        cursor = connection.execute(statement.sql, statement.params)
        rows = cursor.fetchall() if cursor.description else []
    except sqlite3.IntegrityError as error:
        if "UNIQUE" in str(error) or "PRIMARY KEY" in str(error):
            raise (statement.duplicate or Duplicate()) from error
        raise
    changed = len(rows) if cursor.description else cursor.rowcount
    if statement.rows is not None and changed != statement.rows:
        raise statement.error or WriteConflict()
    return Result(changed, rows)


def _check_writable(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.Error where nothing can be written: to find that out at the first request would be too late."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("INSERT INTO migrations VALUES (-1, 'never committed')")
    finally:
        connection.execute("ROLLBACK")


def _migrate(connection: sqlite3.Connection, migrations: list[Migration]) -> None:
    """Apply what is missing, each migration in one transaction. Refuses a database of a newer version."""
    connection.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL)")
    done = {row["number"] for row in connection.execute("SELECT number FROM migrations")}
    newest = migrations[-1].number if migrations else 0
    if done and max(done) > newest:
        raise StartupError(
            f"The database has schema {max(done)}, this version of Instar knows schema {newest}: "
            "start the newer version, or restore a backup made before the upgrade."
        )
    for migration in migrations:
        if migration.number in done:
            continue
        connection.execute("BEGIN IMMEDIATE")
        try:
            for sql in migration.statements:
                connection.execute(sql)
            connection.execute("INSERT INTO migrations VALUES (?, ?)", (migration.number, migration.name))
        except sqlite3.Error:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        log.info("store.migrated", number=migration.number, name=migration.name)
