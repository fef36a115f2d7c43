"""One private RabbitMQ for all tests of the bus in this run, and a vhost of its own for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.cli.servers.rabbitmq import PROGRAMS, PrivateRabbitMq

VHOSTS = 40


class Rabbit:
    """The broker and how many of its vhosts have been given out."""

    def __init__(self, broker: PrivateRabbitMq) -> None:
        self.broker = broker
        self.given = 0

    def vhost(self) -> str:
        self.given += 1
        return f"test-{self.given}"


@pytest.fixture(scope="session")
def rabbit() -> Iterator[Rabbit]:
    if not PROGRAMS.exists():
        pytest.skip("rabbitmq-server is not installed")
    directory = Path(tempfile.mkdtemp(prefix="instar-rabbitmq-"))
    broker = PrivateRabbitMq(directory)
    try:
        broker.start()
        broker.add_vhosts([f"test-{number}" for number in range(1, VHOSTS + 1)])
        yield Rabbit(broker)
    finally:
        broker.remove()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def rabbit_vhost(rabbit: Rabbit) -> str:
    """The URL of an empty vhost."""
    return rabbit.broker.url(rabbit.vhost())
