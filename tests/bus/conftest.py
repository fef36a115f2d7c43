"""One private RabbitMQ for all tests of the bus in this process. Each test leaves it without queues."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import aio_pika
import pytest

from instar.bus import rabbitmq_wire as wire
from instar.cli.servers.rabbitmq import PROGRAMS, PrivateRabbitMq, Tls
from tests.bus.certificates import make_certificates

QUEUES = ("q", "held", "later", "late", "poison", "host.a", "host.b", "agent.simulated", wire.DEAD_LETTERS)


class Rabbit(NamedTuple):
    broker: PrivateRabbitMq
    tls: Tls

    @property
    def url(self) -> str:
        return self.broker.url()


@pytest.fixture(scope="session")
def rabbit() -> Iterator[Rabbit]:
    if not PROGRAMS.exists():
        pytest.skip("rabbitmq-server is not installed")
    # Not below pytest's own folder, which only root may enter: the broker is another user.
    directory = Path(tempfile.mkdtemp(prefix="instar-rabbitmq-"))
    tls = make_certificates(directory / "tls")
    broker = PrivateRabbitMq(directory, tls=tls)
    try:
        broker.start()
        yield Rabbit(broker, tls)
    finally:
        broker.remove()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def empty_broker(rabbit: Rabbit) -> AsyncIterator[str]:
    """Its URL. What the test made is removed again."""
    yield rabbit.url
    await asyncio.to_thread(rabbit.broker.start)  # where a test has failed while it was away
    await remove_queues(rabbit.url)


async def remove_queues(url: str) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        for queue in QUEUES:
            await channel.queue_delete(queue)
