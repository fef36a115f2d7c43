"""What every bus must do. A further implementation is one more parameter of the fixture `bus`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from instar.bus.contract import DEAD, Bus, Message, NobodyListens, Reply
from instar.bus.memory import MemoryBus
from instar.bus.rabbitmq import RabbitMqBus
from instar.bus.socket import SocketBus
from instar.bus.socket_server import BusServer
from instar.config import RabbitMqSettings
from tests.bus.conftest import remove_queues
from tests.patience import PATIENCE_S


@asynccontextmanager
async def memory(_: Path) -> AsyncIterator[Bus]:
    bus = MemoryBus()
    await bus.open()
    yield bus
    await bus.close()


@asynccontextmanager
async def over_socket(directory: Path) -> AsyncIterator[Bus]:
    """What one client sends reaches itself by way of the owner."""
    async with memory(directory) as owner:
        server, client = BusServer(owner, directory / "bus"), SocketBus(directory / "bus")
        await server.open()
        await client.open()
        yield client
        await client.close()
        await server.close()


@pytest.fixture(
    params=[memory, over_socket, pytest.param("rabbitmq", marks=pytest.mark.host)], ids=["memory", "socket", "rabbitmq"]
)
async def bus(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bus]:
    if request.param == "rabbitmq":
        url = request.getfixturevalue("rabbit").url
        over_rabbitmq = RabbitMqBus(url, RabbitMqSettings())
        await over_rabbitmq.open()
        yield over_rabbitmq
        await over_rabbitmq.close()
        await remove_queues(url)
        return
    async with request.param(tmp_path) as bus:
        yield bus


def message(text: str = "hello", deadline_s: float = 5) -> Message:
    return Message("Test", text.encode(), deadline_s)


async def echo(received: Message) -> Reply:
    return Reply(received.body.upper())


async def test_a_command_is_answered(bus: Bus) -> None:
    await bus.serve("q", echo, concurrency_max=2)
    assert (await bus.call("q", message())).body == b"HELLO"


async def test_an_error_comes_back_as_its_facts(bus: Bus) -> None:
    async def refuse(_: Message) -> Reply:
        return Reply(error=("HostUnreachable", "no", {"host": "h"}))

    await bus.serve("q", refuse, concurrency_max=1)
    assert (await bus.call("q", message())).error == ("HostUnreachable", "no", {"host": "h"})


async def test_a_queue_without_a_consumer_says_so_at_once(bus: Bus) -> None:
    with pytest.raises(NobodyListens):
        await bus.call("nobody", message(deadline_s=30))
    with pytest.raises(NobodyListens):
        await bus.send("nobody", message())


async def test_a_consumer_that_was_cancelled_serves_no_more(bus: Bus) -> None:
    """At once, or where queues outlive their consumers at the deadline."""
    serving = await bus.serve("q", echo, concurrency_max=1)
    await serving.cancel()
    with pytest.raises((NobodyListens, TimeoutError)):
        await bus.call("q", message(deadline_s=0.5))


async def test_a_call_ends_at_its_deadline_and_the_work_goes_on(bus: Bus) -> None:
    done = asyncio.Event()

    async def slow(_: Message) -> Reply:
        await asyncio.sleep(0.1)
        done.set()
        return Reply()

    await bus.serve("q", slow, concurrency_max=1)
    with pytest.raises(TimeoutError):
        await bus.call("q", message(deadline_s=0.02))
    await asyncio.wait_for(done.wait(), PATIENCE_S)


async def test_no_more_commands_at_once_than_told(bus: Bus) -> None:
    now = most = 0

    async def count(_: Message) -> Reply:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return Reply()

    await bus.serve("q", count, concurrency_max=3)
    await asyncio.gather(*(bus.call("q", message()) for _ in range(12)))
    assert most == 3


async def test_an_event_reaches_every_subscriber_in_order(bus: Bus) -> None:
    seen: dict[str, list[bytes]] = {"a": [], "b": []}

    def listener(name: str):  # type: ignore[no-untyped-def]
        async def listen(received: Message) -> None:
            await asyncio.sleep(0)
            seen[name].append(received.body)

        return listen

    await bus.subscribe("t.one", listener("a"))
    await bus.subscribe("t.*", listener("b"))
    for number in range(20):
        await bus.publish("t.one", message(str(number)))
    await bus.publish("other", message("no"))
    async with asyncio.timeout(PATIENCE_S):
        while len(seen["a"]) < 20 or len(seen["b"]) < 20:
            await asyncio.sleep(0.005)
    assert seen["a"] == seen["b"] == [str(number).encode() for number in range(20)]


async def test_a_subscriber_that_fails_hears_the_next_event(bus: Bus) -> None:
    heard = asyncio.Event()

    async def fragile(received: Message) -> None:
        if received.body == b"bad":
            raise ValueError
        heard.set()

    await bus.subscribe("t", fragile)
    await bus.publish("t", message("bad"))
    await bus.publish("t", message("good"))
    await asyncio.wait_for(heard.wait(), PATIENCE_S)


async def test_who_is_cancelled_while_a_subscriber_ends_is_cancelled(bus: Bus) -> None:
    """A loop that did not hear that it should end would be waited for in vain."""
    begun, ends, end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def linger(_: Message) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ends.set()
            await end.wait()

    subscription = await bus.subscribe("t", linger)
    await bus.publish("t", message())
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
        cancelling = asyncio.create_task(subscription.cancel())
        await ends.wait()
        cancelling.cancel()
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await cancelling


async def test_an_event_that_nobody_hears_is_no_error(bus: Bus) -> None:
    await bus.publish("silence", message())


async def test_what_waits_for_a_consumer_is_counted(bus: Bus) -> None:
    """Where the bus can tell: a queue that nobody knows has no number."""
    go_on = asyncio.Event()

    async def slow(message: Message) -> Reply:
        await go_on.wait()
        return Reply()

    serving = await bus.serve("q", slow, concurrency_max=1)
    for _ in range(4):
        await bus.send("q", message())
    if await bus.waiting("q") is not None:
        async with asyncio.timeout(PATIENCE_S):
            while await bus.waiting("q") != 3:
                await asyncio.sleep(0.05)
    assert await bus.waiting("nobody knows this queue") in (None, 0)
    assert await bus.waiting(DEAD) in (None, 0)
    go_on.set()
    await serving.cancel()
