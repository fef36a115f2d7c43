"""One cloud of real processes for all tests of this folder: what a test kills it starts again."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from instar.cli.distributed.layout import Layout
from instar.cli.distributed.local_cloud import LocalCloud
from instar.volumes.local import remove_exports
from tests.patience import PATIENCE_S

SETTLE_S = PATIENCE_S
SETTINGS = {
    "engine": {"lease_s": 2, "poll_s": 0.5},
    "host": {"heartbeat_s": 0.5, "down_after_s": 30, "lost_after_s": 30},
    "simulated": {"spawn_s": 0.2},
    "identity": {"argon2_memory_kib": 64, "argon2_time_cost": 1},
    "quota": {"instances": -1, "cores": -1, "ram": -1},
}
LAYOUT = Layout(libvirt_hosts=0, simulated_hosts=10, restarts=False, durable=False, settings=SETTINGS)


class Client:
    """Requests of the admin, each on a connection of its own: the kernel deals them out to the APIs."""

    def __init__(self, cloud: LocalCloud) -> None:
        self.cloud = cloud
        auth = yaml.safe_load(cloud.state.clouds_yaml.read_text())["clouds"]["instar"]["auth"]
        user = {"name": auth["username"], "domain": {"id": "default"}, "password": auth["password"]}
        scope = {"project": {"name": auth["project_name"], "domain": {"id": "default"}}}
        identity = {"methods": ["password"], "password": {"user": user}}
        body = {"auth": {"identity": identity, "scope": scope}}
        answer = httpx.post(f"{cloud.url}/identity/v3/auth/tokens", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 201, answer.text
        self._headers = {"x-auth-token": answer.headers["x-subject-token"], "openstack-api-version": "compute 2.96"}
        self.image = self.ask("GET", "/image/v2/images").json()["images"][0]["id"]
        self.network = self.ask("GET", "/network/v2.0/networks").json()["networks"][0]["id"]

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        answer = httpx.request(method, self.cloud.url + path, json=body, headers=self._headers, timeout=PATIENCE_S)
        assert answer.status_code < 400, answer.text
        return answer

    def compute(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return self.ask(method, "/compute/v2.1" + path, body)

    def create(self, **more: Any) -> str:
        server = {"name": f"guest-{secrets.token_hex(3)}", "flavorRef": "1", "imageRef": self.image} | more
        body = {"server": server | {"networks": [{"uuid": self.network}]}}
        server_id: str = self.compute("POST", "/servers", body).json()["server"]["id"]
        return server_id

    def server(self, server_id: str) -> dict[str, Any]:
        server: dict[str, Any] = self.compute("GET", f"/servers/{server_id}").json()["server"]
        return server

    def until(self, server_id: str, status: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [self.server(server_id)]
            return found[0]["status"] == status and found[0]["OS-EXT-STS:task_state"] is None

        until(is_there, lambda: f"{found}")
        return found[0]


def until(what: Callable[[], object], why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + SETTLE_S
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


@pytest.fixture(scope="session")
def cloud() -> Iterator[LocalCloud]:
    directory = Path(tempfile.mkdtemp(prefix="instar-distributed-"))  # pytest's own folders let no other account through
    directory.chmod(0o711)
    cloud = LocalCloud(directory / "state", LAYOUT, say=lambda text: None)
    try:
        cloud.start()
        yield cloud
    finally:
        cloud.close()
        cloud.rabbitmq.remove()
        remove_exports(cloud.state.path)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def _client(cloud: LocalCloud) -> Client:
    return Client(cloud)


@pytest.fixture
def client(cloud: LocalCloud, _client: Client) -> Iterator[Client]:
    """With every process up, before and after."""
    yield _client
    for name in cloud.processes.names:
        cloud.processes.start(name)


def log_of(cloud: LocalCloud, name: str) -> str:
    return (cloud.state.path / "log" / f"{name}.log").read_text()
