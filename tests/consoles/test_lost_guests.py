"""A guest's side of a console that goes while its client writes."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from instar.consoles import proxy
from tests.patience import PATIENCE_S


class Typing:
    """The client's side: it writes and writes."""

    async def receive(self) -> bytes:
        await asyncio.sleep(0.005)
        return b"x"


async def test_a_guest_that_is_gone_is_a_lost_connection_on_the_loop_of_the_program() -> None:
    """On uvloop writing to it is a RuntimeError, which the console took for a fault of its own."""

    async def types() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        _, writer = await asyncio.open_unix_connection(sock=ours)
        theirs.close()
        for _ in range(2):  # the second time it is known
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(PATIENCE_S):
                    await proxy._to_guest(Typing(), writer, lambda: None)  # type: ignore[arg-type]
        writer.close()

    await asyncio.to_thread(uvloop.run, types())
