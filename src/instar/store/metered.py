"""A store that counts and times what is asked of it. Put around the real one where a process is put together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from instar.errors import InstarError, Unavailable
from instar.metrics import numbers
from instar.store.contract import Result, Row, Statement, Store, Value


class MeteredStore:
    """Implements `Store` by another one."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def open(self) -> None:
        await self._store.open()

    async def close(self) -> None:
        await self._store.close()

    async def read(self, sql: str, params: Mapping[str, Value] | None = None) -> Sequence[Row]:
        began = time.perf_counter()
        result = "failed"
        try:
            rows = await self._store.read(sql, params)
            result = "ok"
            return rows
        finally:
            numbers.store_did("read", result, time.perf_counter() - began)

    async def write(self, *statements: Statement) -> list[Result]:
        began = time.perf_counter()
        result = "failed"
        try:
            results = await self._store.write(*statements)
            result = "ok"
            return results
        except InstarError as error:
            # A rule that refuses (a limit, another's change) is the database at its work.
            result = "failed" if isinstance(error, Unavailable) else "refused"
            raise
        finally:
            numbers.store_did("write", result, time.perf_counter() - began)

    async def end_silent(self) -> None:
        await self._store.end_silent()
