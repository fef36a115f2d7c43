"""What every store must do, on each of them."""

from __future__ import annotations

import asyncio

import pytest

from instar.errors import Conflict, Unavailable
from instar.store.contract import Duplicate, Statement, Store, WriteConflict


def put(name: str, value: str) -> Statement:
    return Statement("INSERT INTO cloud_facts (name, value) VALUES (:name, :value)", {"name": name, "value": value}, 1)


def swap(name: str, was: str | None, value: str) -> Statement:
    return Statement(
        "UPDATE cloud_facts SET value = :value WHERE name = :name AND value IS NOT DISTINCT FROM :was",
        {"name": name, "was": was, "value": value},
        rows=1,
    )


async def names(store: Store) -> list[str]:
    return [row["name"] for row in await store.read("SELECT name FROM cloud_facts ORDER BY name")]


async def test_what_was_written_is_read_by_column_name(store: Store) -> None:
    await store.write(put("a", "1"))
    (row,) = await store.read("SELECT name, value FROM cloud_facts WHERE name = :name", {"name": "a"})
    assert (row["name"], row["value"]) == ("a", "1")


async def test_all_statements_or_none(store: Store) -> None:
    with pytest.raises(WriteConflict):
        await store.write(put("a", "1"), swap("nobody", "x", "y"))
    assert await names(store) == []


async def test_a_statement_names_the_error_of_its_missing_row(store: Store) -> None:
    wanted = Conflict("somebody was quicker")
    statement = swap("nobody", "x", "y")._replace(error=wanted)
    with pytest.raises(Conflict, match="somebody was quicker"):
        await store.write(statement)


async def test_a_duplicate_is_told_from_other_refusals(store: Store) -> None:
    await store.write(put("a", "1"))
    with pytest.raises(Duplicate):
        await store.write(put("a", "2"))
    with pytest.raises(Conflict, match="name taken"):
        await store.write(put("a", "2")._replace(duplicate=Conflict("name taken")))


async def test_returning_gives_rows(store: Store) -> None:
    await store.write(put("a", "1"))
    statement = Statement("UPDATE cloud_facts SET value = '2' WHERE name = 'a' RETURNING value", {}, 1)
    (result,) = await store.write(statement)
    assert (result.rowcount, result.rows[0]["value"]) == (1, "2")


async def test_null_is_compared_like_a_value(store: Store) -> None:
    await store.write(put("a", "1"))
    with pytest.raises(WriteConflict):
        await store.write(swap("a", None, "2"))


async def test_of_many_swaps_at_once_one_wins(store: Store) -> None:
    await store.write(put("a", "start"))
    attempts = [store.write(swap("a", "start", str(number))) for number in range(50)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, WriteConflict) for outcome in outcomes) == 49


async def test_a_refused_transaction_takes_none_of_its_group_with_it(store: Store) -> None:
    await store.write(put("taken", "1"))
    attempts = [store.write(put("taken" if number % 3 == 0 else f"n{number:02}", "1")) for number in range(30)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert [isinstance(outcome, Duplicate) for outcome in outcomes] == [number % 3 == 0 for number in range(30)]
    assert len(await names(store)) == 21


async def test_a_caller_that_is_cancelled_leaves_the_others_alone(store: Store) -> None:
    waiting = [asyncio.ensure_future(store.write(put(f"n{number}", "1"))) for number in range(10)]
    await asyncio.sleep(0)
    waiting[3].cancel()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert sum(isinstance(outcome, list) for outcome in outcomes) == 9


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.close()
    with pytest.raises(Unavailable):
        await store.write(put("a", "1"))
