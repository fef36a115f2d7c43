"""One subscriber's events: how it ends."""

from __future__ import annotations

import asyncio

import pytest

from instar.bus.contract import Message
from instar.bus.subscriber import Subscriber


async def test_who_is_cancelled_while_a_handler_takes_its_time_to_end_hears_of_it() -> None:
    """A keeper that had just lost its lease was closing its subscriptions when it was told to end. It never heard that:
    closing a subscription took the word for the handler's own end, and the conductor waited for its keeper for ever."""
    begun, leave = asyncio.Event(), asyncio.Event()

    async def slow(_: Message) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await leave.wait()

    subscriber = Subscriber("topic", slow, lambda _: None)
    subscriber.put(Message("Test", b""))
    await begun.wait()
    ending = asyncio.create_task(subscriber.cancel())
    await asyncio.sleep(0.01)
    ending.cancel()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await ending
    await subscriber.cancel()
