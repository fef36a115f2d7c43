"""Which guests are looked at after events, and who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from instar.errors import HostUnreachable
from instar.lifecycle import guest_events
from instar.lifecycle.guest_events import GuestEvents
from tests.patience import PATIENCE_S


class Looks:
    """`gone` hosts give no answer until `told`; guests in `busy` are looked at again."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.away: list[str] = []
        self.gone: set[str] = set()
        self.busy: set[str] = set()
        self.told = asyncio.Event()
        self.events = GuestEvents(self.look, self.away.append)

    async def look(self, host: str, instance_id: str) -> bool:
        self.seen.append((host, instance_id))
        if host in self.gone:
            await self.told.wait()
            raise HostUnreachable(host=host)
        await asyncio.sleep(0)
        return instance_id not in self.busy

    async def until_seen(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.seen) < count or self.events.waiting:
                await asyncio.sleep(0.005)


@pytest.fixture
async def looks() -> AsyncIterator[Looks]:
    made = Looks()
    made.events.open()
    yield made
    await made.events.close()


async def test_host_that_gives_no_answer_keeps_no_other_waiting_and_is_asked_once(looks: Looks) -> None:
    """One guest after another was looked at, in the whole cloud, and each of a host that had just died took twenty seconds:
    what happened on other hosts was seen minutes later."""
    looks.gone.add("gone")
    for number in range(100):
        looks.events.put("gone", f"g{number}")
    async with asyncio.timeout(PATIENCE_S):
        while not looks.seen:
            await asyncio.sleep(0.005)
    looks.events.put("here", "a")
    async with asyncio.timeout(PATIENCE_S):
        while ("here", "a") not in looks.seen:
            await asyncio.sleep(0.005)
    assert looks.seen == [("gone", "g0"), ("here", "a")]
    looks.told.set()
    async with asyncio.timeout(PATIENCE_S):
        while not looks.away:
            await asyncio.sleep(0.005)
    assert looks.away == ["gone"], "the whole of it is looked at"
    assert (len(looks.seen), looks.events.waiting) == (2, 0)
    looks.gone.clear()
    looks.events.put("gone", "g1")
    await looks.until_seen(3)
    assert looks.seen[-1] == ("gone", "g1")


async def test_guests_of_a_host_come_in_turn_each_once_and_busy_ones_again(
    looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_events, "BUSY_RETRY_S", 0.01)
    looks.busy.add("b")
    for instance_id in ("a", "b", "a", "b", "c"):
        looks.events.put("h", instance_id)
    async with asyncio.timeout(PATIENCE_S):
        while looks.seen.count(("h", "b")) < 3:
            await asyncio.sleep(0.005)
    assert [one for one in looks.seen if one != ("h", "b")] == [("h", "a"), ("h", "c")]
    looks.busy.clear()
    await looks.until_seen(5)


async def test_it_looks_again_after_it_was_closed_in_the_middle_of_a_look(looks: Looks) -> None:
    looks.gone.add("h")
    looks.events.put("h", "a")
    async with asyncio.timeout(PATIENCE_S):
        while not looks.seen:
            await asyncio.sleep(0.005)
    await looks.events.close()
    looks.gone.clear()
    looks.events.open()
    looks.events.put("h", "a")
    await looks.until_seen(2)
