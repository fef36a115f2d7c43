"""A statement that stands before all others in every transaction of some work, wherever in the program they are made.

The engine sets it: while a step runs, whatever service it calls writes only as long as the operation still belongs to this
conductor; what the keeper does, only as long as it is the keeper. Each implementation of `Store.write` asks `guarded`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from instar.store.contract import Statement


class Guard:
    """`active` False: the work is over; what it has started and nobody waits for writes without it."""

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.active = True


_guard: ContextVar[Guard | None] = ContextVar("guard", default=None)


@contextmanager
def guarding(statement: Statement) -> Iterator[Guard]:
    """Tasks that are begun in the block write under this statement, until the block ends."""
    guard = Guard(statement)
    token = _guard.set(guard)
    try:
        yield guard
    finally:
        guard.active = False
        _guard.reset(token)


def guard_task(statement: Statement) -> None:
    """From now on this task, and those that it begins, write under this statement."""
    _guard.set(Guard(statement))


def guarded(statements: tuple[Statement, ...]) -> tuple[tuple[Statement, ...], int]:
    """What is to be written in their place, and how many results at its beginning are not the caller's."""
    guard = _guard.get()
    if guard is None or not guard.active:
        return statements, 0
    return (guard.statement, *statements), 1
