"""INSTAR_TEST_BUS=rabbitmq: a private RabbitMQ of this test process, in which each cloud of a test has a virtual host.

Its management plugin makes them, since `rabbitmqctl` takes seconds for each. Started and ended by conftest.py."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from instar.bus.contract import EventHandler, Message
from instar.cli.servers.rabbitmq import ADMIN, PrivateRabbitMq, _free_ports

ASKED = "INSTAR_TEST_BUS"
SERVER, ADMIN_SERVER = "INSTAR_TEST_BUS_SERVER", "INSTAR_TEST_BUS_ADMIN"  # URLs, for a test's processes too
REQUEST_MAX_S = 60.0
AFTER_US = 'read -r _; kill -KILL "$(cat "$1")" && sleep 2 && epmd -port "$2" -kill; rm -rf "$3"'


def asked_for() -> bool:
    return os.environ.get(ASKED) == "rabbitmq"


def on_rabbitmq() -> bool:
    return SERVER in os.environ


def bus_of(directory: Path) -> str:
    """The setting `bus` of the cloud in the directory: empty, the bus in its process, where RabbitMQ was not asked for."""
    return f"{os.environ[SERVER]}/{_name(directory)}" if on_rabbitmq() else ""


def ensure_bus(directory: Path) -> None:
    """The directory's cloud has its virtual host, if it is to have one."""
    if on_rabbitmq():
        with _admin() as admin:
            admin.put(f"/api/vhosts/{_name(directory)}").raise_for_status()  # there already: nothing changes


async def hear_notifications(bus: Any, handler: EventHandler) -> None:
    """Over a broker they go to the world outside, in its form (tests/bus): what the broker has taken counts as told."""
    if not on_rabbitmq():
        await bus.subscribe("notifications.*", handler)
        return
    inner = getattr(bus, "_bus", bus)  # what is counted goes over this one
    notify = inner.notify

    async def noted(topic: str, message: Message) -> None:
        await notify(topic, message)
        await handler(message)

    inner.notify = noted


def forget_all() -> None:
    """All virtual hosts of clouds, and what is in them."""
    with _admin() as admin:
        for vhost in admin.get("/api/vhosts?columns=name").raise_for_status().json():
            if vhost["name"] != "/":
                admin.delete(f"/api/vhosts/{quote(vhost['name'], safe='')}").raise_for_status()


def _admin() -> httpx.Client:
    return httpx.Client(base_url=os.environ[ADMIN_SERVER], timeout=REQUEST_MAX_S, trust_env=False)


def _name(directory: Path) -> str:
    return "d" + hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:24]


class TestBroker(PrivateRabbitMq):
    """Its files lie in a directory of its own, which goes with it, also where this process is killed."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="instar-rabbitmq-")))
        (self._management_port,) = _free_ports(1)
        self._watch: subprocess.Popen[bytes] | None = None

    def _prepare(self) -> None:
        super()._prepare()
        (self.directory / "enabled_plugins").write_text("[rabbitmq_management].", encoding="ascii")

    def _configuration(self) -> str:
        return super()._configuration() + "\n".join([
            "management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self._management_port}",
            "management.disable_stats = true", "management_agent.disable_metrics_collector = true", "",
        ])  # fmt: skip

    def start(self) -> None:
        super().start()
        if self._watch is None:
            arguments = [str(self.directory / "pid"), str(self._broker().epmd_port), str(self.directory)]
            self._watch = subprocess.Popen(
                ["sh", "-c", AFTER_US, "sh", *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """For this process, and those that it starts."""
        secret = f"{ADMIN}:{quote(self.password, safe='')}"
        return {
            SERVER: f"amqp://{secret}@localhost:{self.port}",
            ADMIN_SERVER: f"http://{secret}@127.0.0.1:{self._management_port}",
        }

    def close(self) -> None:
        self.remove()
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._watch is not None:
            assert self._watch.stdin is not None
            self._watch.stdin.close()
            self._watch.wait(REQUEST_MAX_S)
