"""What a database must do for Instar. Implemented by `sqlite.py`; every implementation passes tests/store.

A transaction is data: a list of statements, each with the number of rows that it must touch. So one message to the
database makes one transaction, no code runs while it is open, and many can be committed in one group. SQL is written
once, in the dialect that SQLite and PostgreSQL share, with `:name` parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from instar.errors import InstarError

Value = str | int | float | bytes | None


class Statement(NamedTuple):
    """One SQL statement of a transaction.

    `rows`: exactly so many rows must be changed (or returned), else the whole transaction is rolled back and `error` is
    raised (`WriteConflict` when there is none). `duplicate` is raised instead when a uniqueness rule refuses the row.

    `alone`: from this statement on, transactions that name the same follow each other. For a rule over rows that no two
    of them would both write (a count under a limit): where several write at once, each would see the others' too late.
    """

    sql: str
    params: Mapping[str, Value]
    rows: int | None = None
    error: InstarError | None = None
    duplicate: InstarError | None = None
    alone: str | None = None


class Row(Protocol):
    """A row: columns by name."""

    def __getitem__(self, column: str, /) -> Any: ...


class Result(NamedTuple):
    """What one statement did: rows changed, and the rows of its RETURNING clause."""

    rowcount: int
    rows: Sequence[Row]


class WriteConflict(InstarError):
    """A statement did not touch the rows that it had to: nothing was written."""

    status, fault = 409, "conflictingRequest"
    template = "The record was changed by someone else in the meantime."


class Duplicate(InstarError):
    """A uniqueness rule refused a row: nothing was written."""

    status, fault = 409, "conflictingRequest"
    template = "A record with the same identity exists already."


class Store(Protocol):
    """An open database. Raises StartupError from `open` where it cannot be used (read-only, newer schema)."""

    async def open(self) -> None:
        """Connect and migrate forward to the newest schema."""
        ...

    async def close(self) -> None: ...

    async def read(self, sql: str, params: Mapping[str, Value] | None = None) -> Sequence[Row]:
        """Rows of one SELECT, in a snapshot of committed data."""
        ...

    async def write(self, *statements: Statement) -> list[Result]:
        """All statements in one transaction, durable when this returns. All or nothing."""
        ...

    async def end_silent(self) -> None:
        """End the transactions of processes that have begun one and say nothing more: what is stopped in the middle of one
        would keep its rows from all others. For a database that only one process writes to there is nothing to do."""
        ...
