"""The store on PostgreSQL: a few connections, each with a worker that does one transaction after another.

Whoever reads or writes hands over a job and waits. READ COMMITTED suffices (see docs/decisions/0013): conflicts that the
database itself resolves (deadlocks) are done again, and so is what a lost connection certainly did not do. While the
database is away jobs wait a moment for its return and are then refused with Unavailable; nothing has to be restarted.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import structlog

from instar.config import PostgresqlSettings
from instar.errors import StartupError, Unavailable
from instar.metrics import numbers
from instar.store.contract import Result, Row, Statement, Value
from instar.store.guard import guarded
from instar.store.postgresql_schema import check_schema, migrate
from instar.store.postgresql_session import LOST, Again, Lost, Marker, Session, Shapes

log = structlog.get_logger()

AGAIN_MAX = 12  # times that a transaction is done again for the sake of others
AGAIN_FIRST_S = 0.005
CONNECT_AGAIN_S = (0.05, 0.5)  # first and longest pause between two attempts to connect
CLOSE_S = 5.0
SILENT_MAX_S = 2.0  # a process that is stopped in the middle of a transaction keeps its rows from others no longer
# What will not get better by waiting: wrong password, no such database, no right to use it.
HOPELESS = (
    asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError, asyncpg.InsufficientPrivilegeError,
)  # fmt: skip


class _Job:
    """A read (`statements` None) or a transaction, for which somebody waits until `deadline` if the database is away."""

    __slots__ = ("deadline", "future", "params", "sql", "statements", "unsure")

    def __init__(
        self, future: asyncio.Future[Any], deadline: float, *, sql: str = "", params: Mapping[str, Value] | None = None,
        statements: Sequence[Statement] | None = None,
    ) -> None:  # fmt: skip
        self.future = future
        self.deadline = deadline
        self.sql = sql
        self.params = params or {}
        self.statements = statements
        self.unsure: Marker | None = None  # it may have been committed: first of all that is asked

    def done(self, result: object) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def failed(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class PostgresqlStore:
    """`url` as libpq takes it: postgresql://user@host:port/name?sslmode=…; several hosts for a cluster with failover.
    `migrates`: `open` brings the schema forward, else it refuses one that is older than this version."""

    def __init__(
        self, url: str, settings: PostgresqlSettings | None = None, *, application: str = "instar", migrates: bool = True
    ) -> None:
        self._url = url
        self._settings = settings or PostgresqlSettings()
        self._application = application
        self._migrates = migrates
        self._jobs: deque[_Job] = deque()
        self._idle: list[asyncio.Future[None]] = []  # of workers that wait for a job; the last one that fell idle is woken
        self._workers: set[asyncio.Task[None]] = set()
        self._open = False
        self._away_until = 0.0  # no attempt to connect before: one has just failed
        self._away = False
        self._shapes = Shapes()

    async def open(self) -> None:
        connection = await self._first_connection()
        try:
            await (migrate(connection) if self._migrates else check_schema(connection))
        except (asyncpg.PostgresError, *LOST) as error:
            raise StartupError(f"The database {self._place} cannot be used: {_reason(error)}.") from error
        finally:
            connection.terminate()
        self._open = True

    async def close(self) -> None:
        """What was handed over before is done."""
        self._open = False
        for waiter in self._idle:
            if not waiter.done():
                waiter.set_result(None)
        self._idle.clear()
        if self._workers:
            _, late = await asyncio.wait(self._workers, timeout=CLOSE_S + self._settings.away_wait_s)
            for task in late:
                task.cancel()
        while self._jobs:
            self._jobs.popleft().failed(Unavailable(retry_after_s=1))

    async def read(self, sql: str, params: Mapping[str, Value] | None = None) -> Sequence[Row]:
        rows: Sequence[Row] = await self._do(sql=sql, params=params)
        return rows

    async def write(self, *statements: Statement) -> list[Result]:
        # A caller that is cancelled stops waiting; its transaction is committed or refused all the same.
        statements, others = guarded(statements)
        results: list[Result] = await self._do(statements=statements)
        return results[others:]

    async def end_silent(self) -> None:
        # By the database's own clock. Its time-out for idle transactions does not see who stopped between two messages of
        # one statement; copies of whole tables do nothing but wait for their client.
        ended = await self.read(
            """SELECT pg_terminate_backend(pid) AS ended FROM pg_stat_activity
               WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
                 AND wait_event_type = 'Client' AND wait_event = 'ClientRead' AND state IN ('active', 'idle in transaction')
                 AND state_change < now() - make_interval(secs => :silent_s) AND query NOT LIKE 'COPY%'""",
            {"silent_s": SILENT_MAX_S},
        )
        if ended:
            log.warning("store.silent_ended", sessions=len(ended))

    async def _do(self, **what: Any) -> Any:
        if not self._open or len(self._jobs) >= self._settings.waiting_max:
            raise Unavailable(retry_after_s=1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._jobs.append(_Job(future, loop.time() + self._settings.away_wait_s, **what))
        while self._idle:
            waiter = self._idle.pop()
            if not waiter.done():
                waiter.set_result(None)
                break
        else:
            if len(self._workers) < self._settings.connections:
                # In a context of its own: its log lines belong to no request.
                task = loop.create_task(self._work(), name="postgresql", context=contextvars.Context())
                self._workers.add(task)
                task.add_done_callback(self._workers.discard)
        return await future

    # --- workers ------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """One connection's jobs, one after another, until the store is closed."""
        session: Session | None = None
        try:
            while True:
                if not self._jobs:
                    if not self._open:
                        return
                    waiter = asyncio.get_running_loop().create_future()
                    self._idle.append(waiter)
                    await waiter
                    continue
                job = self._jobs.popleft()
                if job.statements is None and job.future.done():
                    continue  # whoever asked was cancelled
                try:
                    session = await self._serve(job, session)
                except asyncio.CancelledError:
                    job.failed(Unavailable(retry_after_s=1))
                    raise
                except Exception as error:  # noqa: BLE001,RUF100 - handed to the caller that waits for this job
                    if session is not None:
                        session.drop()
                        session = None
                    job.failed(error)
        finally:
            if session is not None:
                await session.close(timeout_s=CLOSE_S)

    async def _serve(self, job: _Job, session: Session | None) -> Session | None:
        """Do the job until it is done, refused, or the database was away too long. Returns the session to go on with."""
        again = 0
        while True:
            try:
                if session is None:
                    session = await self._connect(job)
                    if session is None:
                        job.failed(Unavailable(retry_after_s=self._settings.retry_after_s))
                        return None
                if await self._try(job, session):
                    return session
            except Lost:
                numbers.store_retried("connection")
            except Again as error:
                numbers.store_retried("conflict")
                again += 1
                if again > AGAIN_MAX:
                    job.failed(Unavailable(retry_after_s=1))
                    log.warning("store.conflict", times=again, cause=str(error.__cause__))
                    return session
                await asyncio.sleep(random.uniform(0.5, 1.5) * AGAIN_FIRST_S * 2 ** min(again, 6))  # noqa: S311 - no secret
                continue
            if session is not None:
                session.drop()
                session = None

    async def _try(self, job: _Job, session: Session) -> bool:
        """False: the connection was lost. Raises Lost, Again; what the caller is to be told, it is told."""
        try:
            if job.statements is None:
                job.done(await session.read(job.sql, job.params))
                return True
            if job.unsure is not None:
                results = await session.settle(job.unsure)
                job.unsure = None
                if results is not None:
                    job.done(results)
                    return True
            results, marker = await session.write(job.statements)
        except (Lost, Again):
            raise
        except Exception as error:  # noqa: BLE001,RUF100 - handed to the caller that waits for this job
            job.failed(error)
            return True
        if results is None:
            job.unsure = marker
            # Who must know whether it was done waits longer: to be told "perhaps" helps nobody.
            job.deadline = max(job.deadline, asyncio.get_running_loop().time() + self._settings.unsure_wait_s)
            return False
        job.done(results)
        return True

    # --- connections --------------------------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        """Where the database is, without who logs in and how."""
        parts = urlsplit(self._url)
        return f"{parts.path.lstrip('/')} at {parts.netloc.rpartition('@')[2]}"

    async def _dial(self) -> asyncpg.Connection:
        settings = self._settings
        connection: asyncpg.Connection = await asyncpg.connect(
            self._url,
            timeout=settings.connect_timeout_s,
            command_timeout=settings.statement_timeout_s + 5,
            statement_cache_size=1024,
            max_cached_statement_lifetime=0,
            target_session_attrs="read-write",
            server_settings={
                "application_name": self._application,
                "statement_timeout": str(round(settings.statement_timeout_s * 1000)),
                "lock_timeout": str(round(settings.lock_timeout_s * 1000)),
                "idle_in_transaction_session_timeout": str(round(SILENT_MAX_S * 1000)),
                "default_transaction_isolation": "read committed",
                "standard_conforming_strings": "on",
                "jit": "off",  # no statement of ours is so long that its compilation would pay
            },
        )
        # Sums of 64-bit numbers are exact decimals on PostgreSQL.
        try:
            await connection.set_type_codec("numeric", schema="pg_catalog", encoder=str, decoder=_number, format="text")
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _first_connection(self) -> asyncpg.Connection:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.start_wait_s
        while True:
            try:
                return await self._dial()
            except HOPELESS as error:
                raise StartupError(f"The database {self._place} cannot be used: {_reason(error)}.") from None
            except (asyncpg.PostgresError, *LOST) as error:
                if loop.time() >= deadline:
                    raise StartupError(f"The database {self._place} cannot be reached: {_reason(error)}.") from None
            except (ValueError, asyncpg.ClientConfigurationError) as error:
                raise StartupError(f"The setting `database` is wrong: {_reason(error)}.") from None
            await asyncio.sleep(0.2)

    async def _connect(self, job: _Job) -> Session | None:
        """A new session; None when the job has waited long enough for one."""
        loop = asyncio.get_running_loop()
        pause, longest = CONNECT_AGAIN_S
        while True:
            wait = self._away_until - loop.time()
            if wait > 0:
                if loop.time() >= job.deadline or not self._open:
                    return None
                await asyncio.sleep(min(wait, max(job.deadline - loop.time(), 0.0)))
                continue
            session: Session | None = None
            try:
                session = Session(await self._dial(), self._shapes)
                await session.begin()
            except (asyncpg.PostgresError, *LOST) as error:
                if session is not None:
                    session.drop()
                if not self._away:
                    self._away = True
                    log.warning("store.away", database=self._place, cause=_reason(error))
                pause = min(pause * 2, longest)
                self._away_until = loop.time() + random.uniform(0.5, 1.0) * pause  # noqa: S311 - no secret
                continue
            if self._away:
                self._away = False
                log.info("store.back", database=self._place)
            return session


def _number(text: str) -> int | float:
    return int(text) if "." not in text and text != "NaN" else float(text)


def _reason(error: BaseException) -> str:
    """What an error says, without a dot at its end; connections' errors name host and user, never a password."""
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__
