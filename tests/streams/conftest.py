"""Two hosts on the loopback address: one gives out, one fetches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.streams.server import StreamServer


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[StreamServer]:
    server = StreamServer(StreamIdentity.open(tmp_path / "source-key"), host="source", listen="127.0.0.1")
    await server.open()
    yield server
    await server.close()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[StreamClient]:
    client = StreamClient(StreamIdentity.open(tmp_path / "target-key"), host="target")
    yield client
    await client.close()
