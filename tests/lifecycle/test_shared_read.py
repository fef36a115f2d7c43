"""Many that ask for the same at about the same time share a read, and each gets one that began after its question."""

from __future__ import annotations

import asyncio

import pytest

from instar.lifecycle.shared_read import SharedRead


async def test_who_asks_while_a_read_runs_gets_the_next_one_and_shares_it() -> None:
    began = 0
    gates = [asyncio.Event() for _ in range(3)]

    async def read() -> int:
        nonlocal began
        began += 1
        number = began
        await gates[number - 1].wait()
        return number

    shared = SharedRead(read)
    first = [asyncio.create_task(shared.fresh()) for _ in range(5)]
    await asyncio.sleep(0.01)
    late = [asyncio.create_task(shared.fresh()) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert began == 1
    for gate in gates:
        gate.set()
    assert await asyncio.gather(*first) == [1] * 5
    assert await asyncio.gather(*late) == [2] * 5
    assert await shared.fresh() == 3


async def test_a_read_that_fails_fails_for_those_who_waited_for_it_and_one_who_goes_away_takes_it_from_nobody() -> None:
    fails = True

    async def read() -> str:
        await asyncio.sleep(0.01)
        if fails:
            raise OSError("away")
        return "read"

    shared = SharedRead(read)
    outcomes = await asyncio.gather(shared.fresh(), shared.fresh(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [OSError, OSError]
    fails = False
    goes, stays = (asyncio.create_task(shared.fresh()) for _ in range(2))
    await asyncio.sleep(0)
    goes.cancel()
    assert await stays == "read"
    with pytest.raises(asyncio.CancelledError):
        await goes
