"""One connection to PostgreSQL, and what became of its transactions. Called by the workers of `postgresql.py`.

Each transaction writes, as its last statement, its number into the row of its session. Where an answer is lost, another
connection takes that row away: it waits for a transaction that is just being committed, sees whether it was, and with the
row gone nothing can be committed any more that is still on its way. So a transaction is repeated only when it certainly
was not done, and never a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg

from instar.errors import BadRequest, Unavailable
from instar.store.contract import Duplicate, Result, Row, Statement, Value, WriteConflict
from instar.store.postgresql_sql import (
    FENCED,
    HOLD,
    INFERRED,
    MARKER,
    PARAMETERS_MAX,
    REFUSED,
    ReturnedColumn,
    Shape,
    decode_results,
    encode_results,
    failed_statement,
    has_returning,
    kind_of,
    parameter_names,
    translate,
)

SHAPES_MAX = 512  # functions of one session
COMMON_AFTER = 3  # a shape that came so often becomes a function
AGAIN = frozenset({"40001", "40P01", "55P03"})  # serialization failure, deadlock, lock not got in time
# What ends a connection or says that this server cannot serve now: shutting down, starting, a standby, too many clients.
AWAY = frozenset({"57P01", "57P02", "57P03", "57P05", "25006", "53300", FENCED})
NO_ROOM = frozenset({"53000", "53100", "53200", "53400", "57014", "58030"})  # disk full, no memory, took too long
MARK = MARKER.format(seq="$2", session="$1", result="$3")
LOST = (
    OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError, asyncio.TimeoutError, EOFError,
    asyncpg.InternalClientError,  # what it says when the server has ended the connection between two calls
)  # fmt: skip


class Lost(Exception):
    """The connection is gone, or good for nothing. `unsure`: the transaction may have been committed all the same."""

    def __init__(self, *, unsure: bool) -> None:
        super().__init__()
        self.unsure = unsure


class Again(Exception):
    """The transaction was rolled back by the database for the sake of another: do it again."""


class Marker(NamedTuple):
    """Of a transaction whose answer was lost. `shape`: as it was sent; None: one statement at a time."""

    session: str
    seq: int
    shape: Shape | None


class Shapes:
    """The shapes of a program's transactions, for all its sessions."""

    def __init__(self) -> None:
        self._common: dict[tuple[tuple[str, int | None, bool], ...], Shape | int] = {}
        self._types: dict[str, tuple[str, ...]] = {}
        self._returned: dict[str, tuple[ReturnedColumn, ...]] = {}

    async def find(self, connection: asyncpg.Connection, statements: Sequence[Statement]) -> Shape | None:
        """The shape of a transaction, once it is known to come often."""
        key = tuple((one.sql, one.rows, one.alone is None) for one in statements)
        known = self._common.get(key, 0)
        if isinstance(known, Shape):
            return known
        if known < COMMON_AFTER:
            if len(self._common) > 4 * SHAPES_MAX:  # texts that are new each time: forget those that were rare
                self._common = {one: shape for one, shape in self._common.items() if isinstance(shape, Shape)}
            self._common[key] = known + 1
            return None
        if any(len(parameter_names(one.sql)) > PARAMETERS_MAX for one in statements) or len(self._common) > 4 * SHAPES_MAX:
            return None
        types = [await self._types_of(connection, statement) for statement in statements]
        if any(one is None for one in types):
            return None
        returned = [self._returned.get(statement.sql) for statement in statements]
        made = self._common.get(key)
        if isinstance(made, Shape):
            return made  # another connection was quicker while this one asked
        shape = Shape(statements, [one for one in types if one is not None], returned)
        self._common[key] = shape
        return shape

    async def _types_of(self, connection: asyncpg.Connection, statement: Statement) -> tuple[str, ...] | None:
        """Types of the parameters. NULLs have the one that they had when they were not, or that PostgreSQL infers."""
        sql = statement.sql
        if sql in self._types:
            return self._types[sql]
        text, values = translate(sql, statement.params)
        prepared = await connection.prepare(text)
        inferred = [INFERRED.get(parameter.name) for parameter in prepared.get_parameters()]
        types = tuple(
            kind or "" for kind in (kind_of(value) or guess for value, guess in zip(values, inferred, strict=True))
        )
        if not all(types):
            return None
        if has_returning(sql):
            columns = prepared.get_attributes()
            self._returned[sql] = tuple(ReturnedColumn(one.name, one.type.name == "bytea") for one in columns)
        self._types[sql] = types
        return types


class Session:
    """A connection with its row in store_sessions."""

    def __init__(self, connection: asyncpg.Connection, shapes: Shapes) -> None:
        self._connection = connection
        self._shapes = shapes
        self._functions: dict[Shape, str] = {}
        self._prepared: dict[str, Any] = {}
        self._id = uuid.uuid4().hex
        self._seq = 0

    async def begin(self) -> None:
        """Makes the session known. Raises what the connection raises."""
        await self._connection.execute(
            """INSERT INTO store_sessions (id, seq, result, backend, started)
               SELECT $1, 0, '', pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()""",
            self._id,
        )

    async def close(self, *, timeout_s: float) -> None:
        """Ends the connection in good order, within the time."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(timeout_s):
                await self._connection.execute("DELETE FROM store_sessions WHERE id = $1", self._id)
                await self._connection.close()
        self.drop()

    def drop(self) -> None:
        """Ends the connection at once."""
        if not self._connection.is_closed():
            self._connection.terminate()

    async def read(self, sql: str, params: Mapping[str, Value]) -> Sequence[Row]:
        """Raises Lost, Again, BadRequest, Unavailable, and what else the database says."""
        text, values = translate(sql, params)
        try:
            rows: Sequence[Row] = await self._connection.fetch(text, *values)
        except Exception as error:
            raise _read_as(error) from error
        return rows

    async def write(self, statements: Sequence[Statement]) -> tuple[list[Result] | None, Marker]:
        """One transaction. Without results: the answer was lost, and the marker is to be asked about."""
        shape = None
        try:
            shape = await self._shapes.find(self._connection, statements)
            values = shape.values(statements) if shape is not None else None
            if shape is not None and values is not None and (call := await self._function(shape)):
                return await self._call(shape, call, values, statements)
        except LOST as error:
            raise Lost(unsure=False) from error
        except asyncpg.PostgresError as error:
            raise _outcome(error, None) from error
        return await self._one_by_one(statements)

    async def _function(self, shape: Shape) -> str | None:
        """How the shape's function is called in this session."""
        call = self._functions.get(shape)
        if call is None and len(self._functions) < SHAPES_MAX:
            name = f"pg_temp.instar_{len(self._functions)}"
            try:
                # Its statements find their rows by keys: one plan for all values, not five tries in each connection; and
                # never one that walks through a table, which is chosen while that is small and kept when it is large.
                await self._connection.execute(
                    f"CREATE FUNCTION {name}({shape.arguments}) RETURNS text LANGUAGE plpgsql "
                    "SET plan_cache_mode = force_generic_plan SET enable_seqscan = off "
                    f"AS $instar${shape.body}\n$instar$"
                )
            except asyncpg.InsufficientPrivilegeError:  # it works without, with a round trip for each statement
                return None
            call = self._functions[shape] = f"SELECT {name}{shape.call}"
        return call

    async def _call(
        self, shape: Shape, call: str, values: Sequence[Any], statements: Sequence[Statement]
    ) -> tuple[list[Result] | None, Marker]:
        self._seq += 1
        marker = Marker(self._id, self._seq, shape)
        try:
            told = await self._connection.fetchval(call, *values, self._id, self._seq)
        except asyncpg.PostgresError as error:
            number = failed_statement(error.context) if error.sqlstate != REFUSED else int(error.detail)
            failed = statements[number] if number is not None and 0 <= number < len(statements) else None
            outcome = _outcome(error, failed)
            if isinstance(outcome, Lost):
                return None, marker
            raise outcome from error
        except LOST:
            return None, marker
        return shape.results(told), marker

    async def _one_by_one(self, statements: Sequence[Statement]) -> tuple[list[Result] | None, Marker]:
        self._seq += 1
        marker = Marker(self._id, self._seq, None)
        results: list[Result] = []
        statement: Statement | None = None
        try:
            for text in (HOLD, MARK, *(translate(one.sql, one.params)[0] for one in statements)):
                await self._prepare(text)
            await self._connection.execute("BEGIN")
            for statement in statements:
                results.append(await self._execute(statement))
            statement = None
            if (await self._do(MARK, self._id, self._seq, encode_results(results)))[0] != "UPDATE 1":
                raise Lost(unsure=False)
        except LOST as error:
            raise Lost(unsure=False) from error
        except BaseException as error:
            await self._roll_back()
            if isinstance(error, asyncpg.InvalidCachedStatementError):  # a newer version has changed the schema meanwhile
                self._prepared.clear()
                raise Again from error
            if isinstance(error, asyncpg.PostgresError):
                raise _outcome(error, statement) from error
            raise
        try:
            await self._connection.execute("COMMIT")
        except (asyncpg.PostgresError, *LOST) as error:
            outcome = _outcome(error, None) if isinstance(error, asyncpg.PostgresError) else None
            if isinstance(outcome, Again):
                raise outcome from error
            return None, marker
        return results, marker

    async def _roll_back(self) -> None:
        try:
            await self._connection.execute("ROLLBACK")
        except Exception:  # noqa: BLE001,RUF100 - what was wrong with the transaction is what counts
            self.drop()

    async def _prepare(self, text: str) -> None:
        """Before the transaction begins: PostgreSQL counts one that waits for the second half of a statement as at work, so
        of a process that is stopped there the rows would stay locked for longer than SILENT_MAX_S."""
        if text not in self._prepared:
            if len(self._prepared) >= SHAPES_MAX:
                self._prepared.clear()
            self._prepared[text] = await self._connection.prepare(text)

    async def _do(self, text: str, *values: Value) -> tuple[str, Sequence[Row]]:
        """Status and rows of a statement that is prepared, or (where too many were) is prepared here."""
        await self._prepare(text)
        prepared = self._prepared[text]
        rows: Sequence[Row] = await prepared.fetch(*values)
        return prepared.get_statusmsg(), rows

    async def _execute(self, statement: Statement) -> Result:
        if statement.alone is not None:
            await self._do(HOLD, statement.alone)
        text, values = translate(statement.sql, statement.params)
        status, rows = await self._do(text, *values)
        if has_returning(statement.sql):
            result = Result(len(rows), rows)
        else:
            count = status.rpartition(" ")[2]
            result = Result(int(count) if count.isdigit() else 0, ())
        if statement.rows is not None and result.rowcount != statement.rows:
            raise statement.error or WriteConflict()
        return result

    async def settle(self, marker: Marker) -> list[Result] | None:
        """What a transaction of a lost session did; None: nothing, and never will. Raises Lost, Again."""
        try:
            row = await self._connection.fetchrow(
                "DELETE FROM store_sessions WHERE id = $1 RETURNING seq, result", marker.session
            )
        except Exception as error:
            raise _read_as(error) from error
        if row is None or row["seq"] != marker.seq:
            return None
        return marker.shape.results(row["result"]) if marker.shape is not None else decode_results(row["result"])


def _read_as(error: Exception) -> Exception:
    if isinstance(error, asyncpg.PostgresError):
        return _outcome(error, None)
    return Lost(unsure=False) if isinstance(error, LOST) else error


def _outcome(error: Exception, statement: Statement | None) -> Exception:
    """What an error of the database means to the caller of a transaction (or of a read)."""
    state: str = getattr(error, "sqlstate", None) or ""
    if state in AGAIN:
        return Again()
    if state in AWAY or state.startswith("08"):
        return Lost(unsure=False)
    if state in NO_ROOM:
        return Unavailable(retry_after_s=1)
    named = statement or Statement("", {})
    if state in ("22021", "22P05"):
        return BadRequest("Texts cannot have the character NUL.")
    if state == REFUSED:
        return named.error or WriteConflict()
    if state == "23505":
        return named.duplicate or Duplicate()
    if state == "23503":  # what the statement relies on went, or came, in the meantime
        return named.error or WriteConflict()
    return error
