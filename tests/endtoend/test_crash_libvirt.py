"""The process, and libvirtd below it, die at random moments while real guests are made, rebooted, stopped and deleted."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from tests.endtoend.conftest import clean_host
from tests.endtoend.guest_access import domains_of, libvirt_of
from tests.endtoend.running_cloud import RunningCloud, wait_until
from tests.hypervisor.tiny_guest import write_image
from tests.patience import patience

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]

KILLS = 10
GUESTS = 3
SETTLED_MAX_S = 10.0
ACTIONS: dict[str, tuple[dict[str, Any] | None, ...]] = {  # None: delete
    "ACTIVE": ({"reboot": {"type": "HARD"}}, {"reboot": {"type": "SOFT"}}, {"os-stop": None}, None),
    "SHUTOFF": ({"os-start": None}, {"reboot": {"type": "HARD"}}, None),
}


class Workload:
    """Servers that are made and acted on at random, and what the cloud has promised about them."""

    def __init__(self, cloud: RunningCloud, image_id: str, dice: random.Random) -> None:
        self.cloud, self._image_id, self._dice = cloud, image_id, dice
        self.servers: set[str] = set()
        self.deleted: set[str] = set()
        self.accepted: list[tuple[str, str, str]] = []  # server, request id, action

    def create(self) -> str:
        body = {"name": "tiny", "flavorRef": "1", "imageRef": self._image_id, "networks": "auto"}
        answer = self.cloud.admin.call("POST", "/servers", {"server": body})
        assert answer.status_code == 202, answer.text
        server_id: str = answer.json()["server"]["id"]
        self.servers.add(server_id)
        self._remember(server_id, answer, "create")
        return server_id

    def act(self) -> None:
        """One operation on each server that is idle, and a new server where one is missing."""
        while len(self.servers) < GUESTS:
            self.create()
        for server in self.cloud.admin.get("/servers/detail")["servers"]:
            if server["OS-EXT-STS:task_state"] is None and server["id"] in self.servers:
                self._act_on(server["id"], self._dice.choice(ACTIONS[server["status"]]))

    def _act_on(self, server_id: str, action: dict[str, Any] | None) -> None:
        if action is None:
            answer = self.cloud.admin.call("DELETE", f"/servers/{server_id}")
            assert answer.status_code == 204, answer.text
            self.servers.discard(server_id)
            self.deleted.add(server_id)
            self._remember(server_id, answer, "delete")
        else:
            answer = self.cloud.admin.act(server_id, action)
            assert answer.status_code in (202, 409), answer.text  # power sync may have been there first
            if answer.status_code == 202:
                self._remember(server_id, answer, next(iter(action)).removeprefix("os-"))

    def _remember(self, server_id: str, answer: httpx.Response, action: str) -> None:
        self.accepted.append((server_id, answer.headers["x-openstack-request-id"], action))

    def check_settled(self, *, statuses: tuple[str, ...] = ("ACTIVE", "SHUTOFF")) -> float:
        """Nothing stuck, lost or leaked; each server is what libvirt says it is. Returns the seconds it took."""
        began = time.monotonic()
        for server_id in self.deleted:
            self.cloud.gone(server_id, SETTLED_MAX_S)
        for server_id in self.servers:
            self.cloud.settled(server_id, *statuses, within_s=SETTLED_MAX_S)
        took = time.monotonic() - began
        assert took < SETTLED_MAX_S * patience()
        wait_until(lambda: self.cloud.admin.findings() == [] and self._as_libvirt_says(), 5)
        assert {one["id"] for one in self.cloud.admin.get("/servers")["servers"]} == self.servers
        return took

    def check_nothing_was_lost(self) -> None:
        for server_id, request_id, action in self.accepted:
            actions = self.cloud.admin.get(f"/servers/{server_id}/os-instance-actions")["instanceActions"]
            assert (request_id, action) in [(one["request_id"], one["action"]) for one in actions]

    def _as_libvirt_says(self) -> bool:
        servers = self.cloud.admin.get("/servers/detail")["servers"]
        running = {one["id"] for one in servers if one["status"] == "ACTIVE"}
        with libvirt_of(self.cloud) as connection:
            real = {domain.UUIDString() for domain in connection.listAllDomains() if domain.isActive()}
        return running == real and domains_of(self.cloud) <= self.servers


@pytest.fixture(scope="module")
def cloud() -> Iterator[RunningCloud]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with clean_host() as make:
        made = make(
            "libvirt", INSTAR_LIFECYCLE_SHUTDOWN_GRACE_S="2", INSTAR_LIFECYCLE_WAIT_SOFT_REBOOT_SECONDS="2",
            INSTAR_QUOTA_INSTANCES="50",
        )  # fmt: skip
        made.start()
        yield made
        assert made.terminate() == 0


@pytest.fixture(scope="module")
def image_id(cloud: RunningCloud, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A guest that fits into a boot sector: it heeds the power button about a second after its start."""
    file = tmp_path_factory.mktemp("image") / "tiny.raw"
    write_image(file)
    body = {"name": "boot-sector", "disk_format": "raw", "container_format": "bare"}
    made = cloud.admin.other("POST", "/image/v2/images", body)
    assert made.status_code == 201, made.text
    path = f"/image/v2/images/{made.json()['id']}/file"
    headers = {"x-auth-token": cloud.admin.token, "content-type": "application/octet-stream"}
    assert cloud.admin.http.put(path, content=file.read_bytes(), headers=headers).status_code == 204
    return str(made.json()["id"])


@pytest.fixture
def workload(cloud: RunningCloud, image_id: str) -> Iterator[Workload]:
    seed = secrets.randbits(32)
    print(f"random seed {seed}")
    load = Workload(cloud, image_id, random.Random(seed))
    yield load
    for server_id in load.servers:
        cloud.admin.call("DELETE", f"/servers/{server_id}")
    for server_id in load.servers:
        cloud.gone(server_id)


@pytest.fixture
def daemon(cloud: RunningCloud) -> Iterator[PrivateDaemon]:
    if not HostPaths(cloud.directory).runtime.exists():
        pytest.skip("the host's own libvirtd is not ours to kill")
    daemon = PrivateDaemon(cloud.directory)
    yield daemon
    asyncio.run(daemon.ensure_running())


def test_killed_ten_times_at_random_moments(cloud: RunningCloud, workload: Workload) -> None:
    seed = secrets.randbits(32)
    print(f"random seed of the kills {seed}")
    dice = random.Random(seed)
    for number in range(KILLS):
        workload.act()
        time.sleep(dice.uniform(0, 1.5))
        cloud.kill()
        if dice.random() < 0.3:  # and again, in the midst of the recovery
            cloud.start()
            time.sleep(dice.uniform(0, 0.5))
            cloud.kill()
        start_s = cloud.start()
        settled_s = workload.check_settled()
        print(f"kill {number + 1}: ready after {start_s:.2f} s, settled {settled_s:.2f} s later")
    workload.check_nothing_was_lost()


def test_libvirtd_killed_while_guests_are_worked_on(cloud: RunningCloud, workload: Workload, daemon: PrivateDaemon) -> None:
    """Operations that were in its hands go on or fail with a reason; afterwards everything works."""
    seed = secrets.randbits(32)
    print(f"random seed of the kills {seed}")
    dice = random.Random(seed)
    for _ in range(3):
        workload.act()
        time.sleep(dice.uniform(0, 0.8))
        daemon.kill_libvirtd()
        for server_id in sorted(workload.servers):
            server = cloud.settled(server_id, "ACTIVE", "SHUTOFF", "ERROR", within_s=SETTLED_MAX_S + 5)
            if server["status"] == "ERROR":
                assert server["fault"]["message"]
                assert cloud.admin.call("DELETE", f"/servers/{server_id}").status_code == 204
                workload.servers.discard(server_id)
                workload.deleted.add(server_id)
        wait_for_host(cloud)
        workload.check_settled()
    workload.check_nothing_was_lost()


def test_libvirtd_away_for_a_while(cloud: RunningCloud, workload: Workload, daemon: PrivateDaemon) -> None:
    """Its host is down, creates and reboots say so, states stay as they were; once it is back everything works."""
    wait_for_host(cloud)
    server_id = workload.create()
    cloud.settled(server_id, "ACTIVE")
    asyncio.run(daemon.hold())
    wait_until(lambda: host_state(cloud) == "down", 20)
    assert cloud.admin.act(server_id, {"reboot": {"type": "HARD"}}).status_code == 202
    server = cloud.settled(server_id, "ACTIVE", within_s=40)
    newest = cloud.admin.get(f"/servers/{server_id}/os-instance-actions")["instanceActions"][0]
    assert (newest["action"], newest["message"]) == ("reboot", "Error")
    assert "host" in server["fault"]["message"].lower()
    failed = cloud.settled(workload.create(), "ERROR", within_s=40)
    assert failed["fault"]["message"].startswith("No valid host was found.")
    assert failed["fault"]["code"] == 500
    asyncio.run(daemon.ensure_running())
    wait_for_host(cloud)
    cloud.settled(workload.create(), "ACTIVE")
    assert cloud.admin.act(server_id, {"reboot": {"type": "HARD"}}).status_code == 202
    cloud.settled(server_id, "ACTIVE")
    assert cloud.admin.call("DELETE", f"/servers/{failed['id']}").status_code == 204
    workload.servers.discard(failed["id"])
    workload.deleted.add(failed["id"])
    workload.check_settled()


def wait_for_host(cloud: RunningCloud) -> None:
    """The hypervisor answers, and the scheduler knows. The other way round would take an old report for a new one."""
    wait_until(lambda: cloud.admin.findings() == [], 45)
    wait_until(lambda: host_state(cloud) == "up", 10)


def host_state(cloud: RunningCloud) -> str:
    (state,) = [
        service["state"] for service in cloud.admin.get("/os-services")["services"] if service["binary"] == "nova-compute"
    ]
    return str(state)
