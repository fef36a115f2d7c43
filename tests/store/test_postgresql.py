"""What is PostgreSQL's own: connections and servers that go, answers that are lost, processes that start at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from instar.cli.servers.postgresql import PrivatePostgresql
from instar.config import PostgresqlSettings
from instar.errors import BadRequest, StartupError, Unavailable
from instar.store.contract import Duplicate, Statement, WriteConflict
from instar.store.migrations import Migration, all_migrations
from instar.store.postgresql import PostgresqlStore
from instar.store.postgresql_schema import for_postgresql, migrate
from instar.store.postgresql_session import Marker, Session
from instar.store.postgresql_sql import Shape, translate
from tests.postgresql_server import PATIENT, TestServer


def put(name: str, value: str | None = "1") -> Statement:
    return Statement("INSERT INTO cloud_facts (name, value) VALUES (:name, :value)", {"name": name, "value": value}, 1)


def add(name: str) -> Statement:
    sql = "UPDATE cloud_facts SET value = value || :one WHERE name = :name RETURNING value, :blob AS blob, :none AS none"
    return Statement(sql, {"name": name, "one": "x", "blob": b"\x00\xff", "none": None}, 1)


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[PostgresqlStore]:
    store = PostgresqlStore(postgresql_url, PATIENT)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def own_server(postgresql_server: TestServer, tmp_path: Path) -> Iterator[PrivatePostgresql]:
    """The tests' server, that this test may kill; it runs again afterwards."""
    yield postgresql_server.server
    postgresql_server.server.start()


def test_parameters_have_the_types_of_their_values_and_literals_are_left_alone() -> None:
    text, values = translate("SELECT :a, ':b', :c FROM t WHERE x = :a", {"a": 1, "c": None})
    assert (text, values) == ("SELECT $1::bigint, ':b', $2 FROM t WHERE x = $1::bigint", [1, None])


def test_migrations_get_the_types_of_postgresql() -> None:
    sql = "CREATE TABLE t (a INTEGER NOT NULL DEFAULT 'TEXT', b BLOB, c TEXT)"
    assert for_postgresql(sql) == "CREATE TABLE t (a BIGINT NOT NULL DEFAULT 'TEXT', b BYTEA, c TEXT COLLATE \"C\")"


async def test_a_transaction_does_the_same_when_it_has_become_a_function(store: PostgresqlStore) -> None:
    """The first times it goes statement by statement, then in one call."""
    await store.write(put("a", ""))
    for number in range(1, 8):
        first, second = await store.write(add("a"), put(f"n{number}"))
        row = first.rows[0]
        assert (first.rowcount, row["value"], row["blob"], row["none"]) == (1, "x" * number, b"\x00\xff", None)
        assert (second.rowcount, list(second.rows)) == (1, [])
    for _ in range(6):
        with pytest.raises(Duplicate):
            await store.write(add("a"), put("n1"))
        with pytest.raises(WriteConflict):
            await store.write(put("m"), add("nobody"))
    rows = await store.read("SELECT value FROM cloud_facts WHERE name IN ('a', 'm')")
    assert [row["value"] for row in rows] == ["x" * 7]


async def test_a_transaction_of_more_values_than_a_function_has_arguments_is_one_call_all_the_same(
    store: PostgresqlStore,
) -> None:
    for number in range(6):
        facts = [f"{number}-{one}" for one in range(60)]
        results = await store.write(*(put(name, name) for name in facts), put(f"b{number}"))
        assert [one.rowcount for one in results] == [1] * 61
    rows = await store.read("SELECT name, value FROM cloud_facts WHERE name LIKE '5-%'")
    assert {row["name"]: row["value"] for row in rows} == {name: name for name in facts}


async def test_numbers_have_64_bits_and_sums_are_numbers(store: PostgresqlStore) -> None:
    big = 1 << 62
    sums = "SELECT :big AS big, CAST(SUM(n) AS NUMERIC) AS s FROM (SELECT 3 AS n) t WHERE :big > 0"
    rows = await store.read(sums, {"big": big})
    assert (rows[0]["big"], rows[0]["s"]) == (big, 3) and isinstance(rows[0]["s"], int)


async def test_text_that_postgresql_cannot_keep_is_refused_by_name(store: PostgresqlStore) -> None:
    with pytest.raises(BadRequest, match="NUL"):
        await store.write(put("a", "x\x00y"))
    await store.write(put("a"))


async def test_connections_that_are_cut_are_replaced_and_nothing_is_done_twice(
    store: PostgresqlStore, postgresql_url: str
) -> None:
    await store.write(put("counter", ""))
    admin = await asyncpg.connect(postgresql_url)
    async def cut() -> None:
        for _ in range(8):
            await admin.execute(
                """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()"""
            )
            await asyncio.sleep(0.1)

    cutting = asyncio.create_task(cut())
    acknowledged = 0
    for start in range(0, 60, 6):
        done = await asyncio.gather(*(store.write(add("counter"), put(f"k{n}")) for n in range(start, start + 6)))
        acknowledged += len(done)
    await cutting
    rows = await store.read("SELECT value FROM cloud_facts WHERE name = 'counter'")
    assert len(rows[0]["value"]) == acknowledged == 60
    assert len(await store.read("SELECT 1 AS one FROM cloud_facts WHERE name LIKE 'k%'")) == 60
    await admin.close()


async def test_a_killed_server_loses_nothing_acknowledged_and_each_write_is_done_once(
    store: PostgresqlStore, own_server: PrivatePostgresql
) -> None:
    await store.write(put("counter", ""))

    async def write(first: int) -> int:
        for number in range(first, first + 40):
            await store.write(add("counter"), put(f"k{number}"))
        return 40

    writers = [asyncio.create_task(write(first)) for first in (0, 100, 200)]
    for _ in range(2):
        await asyncio.sleep(0.15)
        await asyncio.to_thread(own_server.kill)
        await asyncio.to_thread(own_server.start)
    assert sum(await asyncio.gather(*writers)) == 120
    rows = await store.read("SELECT value FROM cloud_facts WHERE name = 'counter'")
    assert len(rows[0]["value"]) == 120


async def test_while_the_database_is_away_requests_are_refused_and_served_again_by_themselves(
    postgresql_url: str, own_server: PrivatePostgresql
) -> None:
    store = PostgresqlStore(postgresql_url, PostgresqlSettings(away_wait_s=0.3, unsure_wait_s=0.3, retry_after_s=7))
    await store.open()
    await store.write(put("a"))
    await asyncio.to_thread(own_server.kill)
    for asked in (store.read("SELECT 1 AS one"), store.write(put("b"))):
        with pytest.raises(Unavailable) as refused:
            await asked
        assert refused.value.retry_after_s == 7
    await asyncio.to_thread(own_server.start)
    await store.write(put("c"))
    assert [row["name"] for row in await store.read("SELECT name FROM cloud_facts ORDER BY name")] == ["a", "c"]
    await store.close()


@pytest.mark.parametrize("warm", [0, 6], ids=["one by one", "as a function"])
@pytest.mark.parametrize("committed", [True, False])
async def test_a_commit_whose_answer_is_lost_is_asked_for_not_repeated(
    store: PostgresqlStore, monkeypatch: pytest.MonkeyPatch, warm: int, committed: bool
) -> None:
    await store.write(put("counter", ""))
    for number in range(warm):
        await store.write(add("counter"), put(f"w{number}"))
    real = Session.write
    lost = []

    async def losing(session: Session, statements: tuple[Statement, ...]) -> object:
        results, marker = await real(session, statements) if committed or lost else (None, None)
        if not lost:
            if marker is None:
                session._seq += 1
                marker = Marker(session._id, session._seq, None)
            lost.append(marker)
            session.drop()
            return None, marker
        return results, marker

    monkeypatch.setattr(Session, "write", losing)
    first, second = await store.write(add("counter"), put("once"))
    assert first.rows[0]["value"] == "x" * (warm + 1) and first.rows[0]["blob"] == b"\x00\xff"
    assert second.rowcount == 1
    assert isinstance(lost[0].shape, Shape) == (committed and warm > 0)


async def test_what_is_still_on_its_way_cannot_be_committed_once_it_was_asked_for(
    store: PostgresqlStore, postgresql_url: str
) -> None:
    await store.write(put("a"))
    admin = await asyncpg.connect(postgresql_url)
    await admin.execute("DELETE FROM store_sessions")
    await store.write(put("b"))  # the old session is refused, a new one does it
    rows = await store.read("SELECT name FROM cloud_facts ORDER BY name")
    assert [row["name"] for row in rows] == ["a", "b"]
    await admin.close()


async def test_a_deadlock_is_done_again(store: PostgresqlStore) -> None:
    await store.write(put("a", ""), put("b", ""))

    def both(first: str, second: str) -> tuple[Statement, ...]:
        pause = Statement("UPDATE cloud_facts SET value = value || pg_sleep(0.05) WHERE name = :name", {"name": first}, 1)
        return pause, add(second)

    await asyncio.gather(store.write(*both("a", "b")), store.write(*both("b", "a")))
    rows = await store.read("SELECT value FROM cloud_facts")
    assert [row["value"] for row in rows] == ["x", "x"]


async def test_processes_that_start_at_once_migrate_once(postgresql_server: TestServer) -> None:
    url = postgresql_server.empty_database()
    stores = [PostgresqlStore(url, PATIENT) for _ in range(3)]
    await asyncio.gather(*(store.open() for store in stores))
    rows = await stores[0].read("SELECT number FROM migrations ORDER BY number")
    assert [row["number"] for row in rows] == [one.number for one in all_migrations()]
    await asyncio.gather(*(store.close() for store in stores))
    postgresql_server.drop(url)


async def test_a_migration_that_fails_leaves_the_schema_as_it_was(postgresql_server: TestServer) -> None:
    url = postgresql_server.empty_database()
    connection = await asyncpg.connect(url)
    broken = Migration(2, "second", ("CREATE TABLE b (x INTEGER)", "CREATE TABLE a (x INTEGER)"))
    with pytest.raises(asyncpg.DuplicateTableError):
        await migrate(connection, [Migration(1, "first", ("CREATE TABLE a (x INTEGER)",)), broken])
    tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    assert [row[0] for row in tables] == ["a", "migrations", "store_sessions"]
    await connection.close()
    postgresql_server.drop(url)


async def test_a_newer_schema_is_refused_and_both_versions_are_named(postgresql_url: str) -> None:
    connection = await asyncpg.connect(postgresql_url)
    await connection.execute("INSERT INTO migrations VALUES (9999, 'future')")
    await connection.close()
    with pytest.raises(StartupError, match=r"schema 9999, this version of Instar knows schema \d+"):
        await PostgresqlStore(postgresql_url).open()


@pytest.mark.parametrize(
    ("wrong", "said"), [("password", "cannot be used"), ("name", "cannot be used"), ("port", "cannot be reached")]
)
async def test_a_database_that_cannot_be_used_is_named_without_its_password(
    postgresql_server: TestServer, wrong: str, said: str
) -> None:
    port = 1 if wrong == "port" else postgresql_server.server.port
    secret = "verysecret" if wrong == "password" else postgresql_server.server.url.split(":")[2].split("@")[0]
    url = f"postgresql://instar:{secret}@127.0.0.1:{port}/{'nowhere' if wrong == 'name' else 'instar'}"
    with pytest.raises(StartupError, match=said) as refused:
        await PostgresqlStore(url, PostgresqlSettings(start_wait_s=0)).open()
    assert secret not in str(refused.value) and f"127.0.0.1:{port}" in str(refused.value)
