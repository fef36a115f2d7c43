"""Which host is looked at next. Time is given."""

from __future__ import annotations

import asyncio

import pytest

from instar.lifecycle.host_looks import AT_ONCE, HostLooks


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_hosts_with_something_new_come_before_those_in_turn_and_each_host_once() -> None:
    looks = HostLooks(1.0, clock=Clock())
    for host, new in (("a", False), ("b", False), ("c", True), ("b", True), ("c", False), ("a", False)):
        looks.put(host, new=new)
    assert [await looks.next() for _ in range(3)] == ["c", "b", "a"]
    looks.done("a")
    looks.put("a", new=False)
    assert await looks.next() == "a"


async def test_a_host_that_is_looked_at_is_looked_at_again_when_that_look_has_ended() -> None:
    """Not by another at the same time: a host that reports often would have all who look."""
    looks = HostLooks(1.0, clock=Clock())
    looks.put("a", new=True)
    assert await looks.next() == "a"
    for new in (False, True, False):
        looks.put("a", new=new)
    looks.put("b", new=False)
    assert await looks.next() == "b"
    looks.done("a")
    assert await looks.next() == "a"
    looks.done("a")
    looks.done("b")
    looks.put("c", new=False)
    assert await looks.next() == "c", "nothing is left of the others"


async def test_those_in_turn_come_at_their_pace_and_something_new_at_once() -> None:
    clock = Clock()
    looks = HostLooks(10.0, clock=clock)
    for number in range(AT_ONCE + 2):
        looks.put(f"h{number}", new=False)
    assert [await looks.next() for _ in range(AT_ONCE)] == [f"h{number}" for number in range(AT_ONCE)]
    waiting = asyncio.create_task(looks.next())
    await asyncio.sleep(0.05)
    assert not waiting.done(), "the clock stands still: there is no turn before a tenth of its second"
    looks.put("new", new=True)
    assert await waiting == "new"
    clock.now += 0.1
    assert await looks.next() == f"h{AT_ONCE}"


async def test_of_many_who_want_the_next_host_one_that_gives_up_takes_none_with_it() -> None:
    looks = HostLooks(1.0, clock=Clock())
    waiting = [asyncio.create_task(looks.next()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    looks.put("a", new=False)
    looks.put("b", new=True)
    assert {await one for one in waiting[1:]} == {"a", "b"}
