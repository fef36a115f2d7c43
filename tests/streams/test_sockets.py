from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import uvloop

from instar.errors import StreamBroken, StreamRefused
from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.streams.server import StreamServer
from tests.patience import PATIENCE_S
from tests.streams.relay import Relay

MIB = 1 << 20
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says all that it heard, but only when the other side has ended its direction."""
    heard = await reader.read()
    writer.write(heard[::-1])
    writer.write_eof()
    await writer.drain()
    writer.close()


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A console: greets, and answers each line, until the other side is gone."""
    writer.write(b"login: ")
    while line := await reader.readline():
        writer.write(b"you said " + line)
    writer.close()


async def across(streams: Streams, said: bytes) -> bytes:
    reader, writer = streams

    async def say() -> None:
        writer.write(said)
        await writer.drain()
        writer.write_eof()

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        group.create_task(say())
        heard = group.create_task(reader.read())
    writer.close()
    return heard.result()


async def in_time(condition: Callable[[], bool], wait_s: float = 5) -> None:
    async with asyncio.timeout(wait_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_connection_goes_both_ways_and_each_way_ends_alone(
    tmp_path: Path, source: StreamServer, client: StreamClient
) -> None:
    async with await asyncio.start_unix_server(echo_at_the_end, tmp_path / "echo"):
        source.grant_socket(client.address, "echo", tmp_path / "echo", valid_s=60)
        said = os.urandom(3 * MIB + 5)
        assert await across(await client.connect(source.address, "echo"), said) == said[::-1]


async def test_tunnel_carries_many_connections(tmp_path: Path, source: StreamServer, client: StreamClient) -> None:
    local = tmp_path / "local"
    async with await asyncio.start_unix_server(echo_at_the_end, tmp_path / "echo"):
        source.grant_socket(client.address, "echo", tmp_path / "echo", valid_s=60)
        tunnel = await client.tunnel(local, source.address, "echo")
        assert stat.S_IMODE(local.stat().st_mode) == 0o600
        said = [os.urandom(size) for size in (0, 1, 65_536, MIB)]
        heard = await asyncio.gather(*[across(await asyncio.open_unix_connection(local), each) for each in said])
        assert heard == [each[::-1] for each in said]
        await tunnel.close()
        assert not local.exists()
        with pytest.raises(FileNotFoundError):
            await asyncio.open_unix_connection(local)


async def test_console_is_let_go_when_its_viewer_leaves(
    tmp_path: Path, source: StreamServer, client: StreamClient
) -> None:
    """A viewer that closes without a word must free the one place that a serial console has."""
    left = asyncio.Event()

    async def console(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"login: ")
        await reader.read()
        left.set()
        await asyncio.sleep(0.1)  # it does not end by itself: the serial line of a guest never does
        while True:
            writer.write(b"noise")
            await writer.drain()
            await asyncio.sleep(0.02)

    server = await asyncio.start_unix_server(console, tmp_path / "console")
    source.grant_socket(client.address, "console", tmp_path / "console", valid_s=60)
    reader, writer = await client.connect(source.address, "console")
    assert await reader.readexactly(7) == b"login: "
    writer.close()
    async with asyncio.timeout(PATIENCE_S):
        await left.wait()
    await in_time(lambda: source._running._threads == {} and client._running._threads == {})
    server.close()


async def test_viewer_sees_the_end_of_a_console_that_goes_away(
    tmp_path: Path, source: StreamServer, client: StreamClient
) -> None:
    async def console(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"going down\n")
        writer.close()

    async with await asyncio.start_unix_server(console, tmp_path / "console"):
        source.grant_socket(client.address, "console", tmp_path / "console", valid_s=60)
        reader, writer = await client.connect(source.address, "console")
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b"going down\n"
        writer.close()
    await in_time(lambda: source._running._threads == {} and client._running._threads == {})


async def test_last_words_arrive_although_nobody_reads_the_answer(
    tmp_path: Path, source: StreamServer, client: StreamClient
) -> None:
    heard = bytearray()

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            heard.extend(piece)
            writer.write(piece)
        writer.close()

    said = os.urandom(150_000)
    async with await asyncio.start_unix_server(sink, tmp_path / "sink"):
        source.grant_socket(client.address, "sink", tmp_path / "sink", valid_s=60)
        _, writer = await client.connect(source.address, "sink")
        writer.write(said)
        await writer.drain()
        writer.close()
        await in_time(lambda: len(heard) == len(said))
    assert heard == said


async def test_slow_reader_holds_back_the_sender(tmp_path: Path, source: StreamServer, client: StreamClient) -> None:
    """What a tunnel holds is bounded: a guest's memory must not pile up in the agent."""
    accepted = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        for _ in range(64):
            writer.write(bytes(MIB))
            await writer.drain()
            accepted += MIB
        writer.close()

    async with await asyncio.start_unix_server(flood, tmp_path / "flood"):
        source.grant_socket(client.address, "flood", tmp_path / "flood", valid_s=60)
        reader, writer = await client.connect(source.address, "flood")
        await asyncio.sleep(0.7)
        assert accepted < 32 * MIB  # the kernel's own buffers included
        async with asyncio.timeout(PATIENCE_S):
            assert len(await reader.readexactly(64 * MIB)) == 64 * MIB
        writer.close()


async def test_revoking_cuts_a_connection_and_refuses_the_next(
    tmp_path: Path, source: StreamServer, client: StreamClient
) -> None:
    async with await asyncio.start_unix_server(talk, tmp_path / "console"):
        source.grant_socket(client.address, "console/1", tmp_path / "console", valid_s=60)
        source.grant_socket(client.address, "console/2", tmp_path / "console", valid_s=60)
        reader, writer = await client.connect(source.address, "console/1")
        other_reader, other_writer = await client.connect(source.address, "console/2")
        writer.write(b"hello\n")
        assert await reader.readuntil(b"\n") == b"login: you said hello\n"
        source.revoke("console/1")
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(StreamRefused, match="not granted"):
            await client.connect(source.address, "console/1")
        other_writer.write(b"still here\n")
        assert await other_reader.readuntil(b"\n") == b"login: you said still here\n"
        other_writer.close()


async def test_lost_connection_ends_both_sides(tmp_path: Path, source: StreamServer, client: StreamClient) -> None:
    async with await asyncio.start_unix_server(talk, tmp_path / "console"):
        source.grant_socket(client.address, "console", tmp_path / "console", valid_s=60)
        relay = Relay(source.address, cut_after=1_000_000, cuts=1)
        reader, writer = await client.connect(relay.address, "console")
        assert await reader.readexactly(7) == b"login: "
        writer.write(bytes(32_768).replace(b"\0", b"line\n") * 20)
        with contextlib.suppress(ConnectionError):  # the end of a socket in which something was not read yet
            async with asyncio.timeout(PATIENCE_S):
                while await reader.read(65536):
                    pass
        writer.close()
        relay.close()
        await in_time(lambda: source._running._threads == {} and client._running._threads == {})


async def test_what_cannot_be_joined_is_told(tmp_path: Path, source: StreamServer, client: StreamClient) -> None:
    source.grant_socket(client.address, "gone", tmp_path / "gone", valid_s=60)
    with pytest.raises(StreamBroken, match="cannot be opened"):
        await client.connect(source.address, "gone")
    nobody = msgspec.structs.replace(source.address, port=1)
    with pytest.raises(StreamBroken, match="nothing listens"):
        await client.connect(nobody, "gone")
    tunnel = await client.tunnel(tmp_path / "local", source.address, "other")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "local")
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.read() == b""
    writer.close()
    assert isinstance(tunnel.error, StreamRefused)
    await tunnel.close()


async def test_strangers_do_not_fill_the_server(tmp_path: Path, client: StreamClient) -> None:
    """Connections that say nothing are bounded, and one more is closed at once."""
    server = StreamServer(
        StreamIdentity.open(tmp_path / "source-key"), host="source", listen="127.0.0.1", connections_max=3
    )
    await server.open()
    try:
        silent = [await asyncio.open_connection("127.0.0.1", server.address.port) for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.address.port)
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        for _, each in [*silent, (reader, writer)]:
            each.close()
        await in_time(lambda: server._running._threads == {})
        (tmp_path / "file").write_bytes(b"data")
        server.grant_file(client.address, "file", tmp_path / "file", valid_s=60)
        await client.fetch_file(server.address, "file", tmp_path / "target", deadline_s=20)
    finally:
        await server.close()


def test_all_of_it_under_uvloop(tmp_path: Path) -> None:
    async def run() -> None:
        server = StreamServer(StreamIdentity.open(tmp_path / "source-key"), host="source", listen="127.0.0.1")
        client = StreamClient(StreamIdentity.open(tmp_path / "target-key"))
        await server.open()
        try:
            for number, each in enumerate(CASES):
                directory = tmp_path / str(number)  # short: a unix socket's path ends after 107 bytes
                directory.mkdir()
                await each(directory, server, client)
        finally:
            await client.close()
            await server.close()

    uvloop.run(run())


CASES: list[Callable[[Path, StreamServer, StreamClient], Awaitable[None]]] = [
    test_connection_goes_both_ways_and_each_way_ends_alone,
    test_tunnel_carries_many_connections,
    test_viewer_sees_the_end_of_a_console_that_goes_away,
    test_revoking_cuts_a_connection_and_refuses_the_next,
]


async def test_a_server_outlives_a_moment_in_which_no_thread_can_be_started(
    tmp_path: Path, source: StreamServer, client: StreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, refused = threading.Thread.start, threading.Event()

    def start(thread: threading.Thread) -> None:
        if thread.name == "stream-server" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    async with await asyncio.start_unix_server(echo_at_the_end, tmp_path / "echo"):
        source.grant_socket(client.address, "echo", tmp_path / "echo", valid_s=60)
        with pytest.raises(StreamBroken):
            await client.connect(source.address, "echo")
        assert refused.is_set()
        assert await across(await client.connect(source.address, "echo"), b"said") == b"dias"
