"""The bus between processes: clients and owners that come, go and misbehave."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from instar.bus import frames
from instar.bus.contract import ConsumerFailed, Message, NobodyListens, Reply
from instar.bus.memory import MemoryBus
from instar.bus.socket import SocketBus
from instar.bus.socket_server import BusServer
from tests.patience import PATIENCE_S


class Both:
    """The owner's bus with its server, and one client."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = MemoryBus()
        self.server = BusServer(self.owner, path)
        self.client = SocketBus(path)

    async def restart_owner(self) -> None:
        await self.server.close()
        self.owner = MemoryBus()
        self.server = BusServer(self.owner, self.path)
        await self.server.open()


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[Both]:
    deep = tmp_path / ("a" * 100)  # longer than the kernel takes as an address
    deep.mkdir()
    both = Both(deep / "bus")
    await both.server.open()
    await both.client.open()
    yield both
    await both.client.close()
    await both.server.close()
    await both.owner.close()


def message(text: str = "hello", deadline_s: float = 5) -> Message:
    return Message("Test", text.encode(), deadline_s)


async def echo(received: Message) -> Reply:
    return Reply(received.body.upper())


async def until_answered(bus: MemoryBus | SocketBus, queue: str = "q") -> Reply:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await bus.call(queue, message())
            except NobodyListens:
                await asyncio.sleep(0.01)


async def test_the_owner_calls_a_client_and_a_client_the_owner(both: Both) -> None:
    await both.client.serve("theirs", echo, concurrency_max=1)
    await both.owner.serve("ours", echo, concurrency_max=1)
    assert (await both.owner.call("theirs", message())).body == b"HELLO"
    assert (await both.client.call("ours", message())).body == b"HELLO"


async def test_clients_reach_each_other(both: Both) -> None:
    other = SocketBus(both.path)
    await other.open()
    await other.serve("other", echo, concurrency_max=1)
    assert (await both.client.call("other", message())).body == b"HELLO"
    await other.close()


async def test_the_socket_is_for_its_owner_alone_and_gone_at_the_end(both: Both) -> None:
    assert stat.S_IMODE(both.path.stat().st_mode) == 0o600
    await both.server.close()
    assert not both.path.exists()


async def test_a_client_that_dies_serves_nothing_and_its_command_fails_at_once(both: Both) -> None:
    begun = asyncio.Event()

    async def hang(_: Message) -> Reply:
        begun.set()
        await asyncio.sleep(60)
        return Reply()

    await both.client.serve("q", hang, concurrency_max=1)
    call = asyncio.create_task(both.owner.call("q", message(deadline_s=30)))
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
        await both.client.close()
        with pytest.raises(NobodyListens):
            await call
        with pytest.raises(NobodyListens):
            await both.owner.call("q", message(deadline_s=30))


async def test_an_owner_that_comes_back_finds_everything_served_and_heard(both: Both) -> None:
    heard = asyncio.Event()

    async def listen(_: Message) -> None:
        heard.set()

    await both.client.serve("q", echo, concurrency_max=1)
    await both.client.subscribe("t.*", listen)
    await both.restart_owner()
    assert (await until_answered(both.owner)).body == b"HELLO"
    await both.owner.publish("t.one", message())
    async with asyncio.timeout(PATIENCE_S):
        await heard.wait()


async def test_a_client_without_an_owner_says_so_at_once_and_serves_when_there_is_one(tmp_path: Path) -> None:
    client, owner = SocketBus(tmp_path / "bus"), MemoryBus()
    await client.open()
    await client.serve("q", echo, concurrency_max=1)
    with pytest.raises(NobodyListens):
        await client.call("q", message(deadline_s=30))
    await client.publish("t", message())
    server = BusServer(owner, tmp_path / "bus")
    await server.open()
    assert (await until_answered(owner)).body == b"HELLO"
    await client.close()
    await server.close()


async def test_a_client_that_waits_for_an_owner_that_goes_is_told(both: Both) -> None:
    async def hang(_: Message) -> Reply:
        await asyncio.sleep(60)
        return Reply()

    await both.owner.serve("q", hang, concurrency_max=1)
    call = asyncio.create_task(both.client.call("q", message(deadline_s=30)))
    await asyncio.sleep(0.05)
    await both.server.close()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(NobodyListens):
            await call


async def test_work_goes_on_when_its_owner_goes(both: Both) -> None:
    begun, end, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work(_: Message) -> Reply:
        begun.set()
        await end.wait()
        done.set()
        return Reply()

    await both.client.serve("q", work, concurrency_max=1)
    await both.owner.send("q", message())
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
        await both.restart_owner()
        end.set()
        await done.wait()
        await until_answered(both.owner)


async def test_a_handler_that_raises_fails_the_command_and_nothing_else(both: Both) -> None:
    async def fragile(received: Message) -> Reply:
        if received.body == b"bad":
            raise ValueError
        return Reply()

    await both.client.serve("q", fragile, concurrency_max=1)
    with pytest.raises(ConsumerFailed):
        await both.owner.call("q", message("bad"))
    await both.owner.call("q", message("good"))


async def test_what_is_too_large_is_refused_and_the_connection_stays(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "FRAME_MAX_BYTES", 4096)

    async def talkative(received: Message) -> Reply:
        return Reply(b"x" * int(received.body))

    await both.client.serve("q", talkative, concurrency_max=1)
    with pytest.raises(ConsumerFailed):
        await both.owner.call("q", message("5000"))
    with pytest.raises(frames.FrameTooLarge):
        await both.client.call("q", message("0" * 5000))
    assert len((await both.owner.call("q", message("3000"))).body) == 3000


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x03abc", b"\x00\x00\x00\x04\x92\xa5He"])
async def test_a_client_that_talks_nonsense_is_hung_up_on(both: Both, garbage: bytes) -> None:
    with frames.socket_address(both.path) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    writer.write(garbage)
    writer.write_eof()
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.read() == b""
    writer.close()
    await both.client.serve("q", echo, concurrency_max=1)
    await both.owner.call("q", message())


async def test_sending_to_a_side_that_is_gone_is_a_lost_connection_on_the_loop_of_the_program() -> None:
    """On uvloop it was a RuntimeError, which nobody expected: it ended the loop that connects again, for ever."""

    async def sends() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        channel = frames.Channel(*await asyncio.open_unix_connection(sock=ours))
        theirs.close()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                while True:  # until it is seen
                    await channel.send(frames.Hello(1))
                    await asyncio.sleep(0.005)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await channel.send(frames.Hello(1))
        await channel.close()

    await asyncio.to_thread(uvloop.run, sends())
