"""Two hosts on one machine: agents, libvirtds and guests of their own, and what is left when one of them dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.cli.hosts.local_host import LocalHost
from tests.endtoend.conftest import clean_host
from tests.endtoend.guest_access import Guest
from tests.endtoend.host_leftovers import processes
from tests.endtoend.running_cloud import INSTAR, RunningCloud, wait_until

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]

HOSTS = ("host-1", "host-2")
ACTIVE_MAX_S = 60.0
AGENT_BACK_MAX_S = 20.0


class TwoHosts:
    """The cloud, and a guest on each of its hosts."""

    def __init__(self, cloud: RunningCloud) -> None:
        self.cloud = cloud
        self.hosts = {name: LocalHost(cloud.directory / "hosts", name) for name in HOSTS}
        self.guests = {name: Guest(cloud, self._build(name)) for name in HOSTS}
        for guest in self.guests.values():
            cloud.settled(guest.id, "ACTIVE", within_s=ACTIVE_MAX_S)
        for guest in self.guests.values():
            guest.wait_for_boot(1)

    def _build(self, host: str) -> str:
        (image,) = self.cloud.demo.other("GET", "/image/v2/images?name=tiny").json()["images"]
        server = {"name": f"on-{host}", "flavorRef": "1", "imageRef": image["id"], "networks": "auto"}
        body = {"server": server | {"availability_zone": f"nova:{host}"}}
        answer = self.cloud.admin.call("POST", "/servers", body)
        assert answer.status_code == 202, answer.text
        server_id: str = answer.json()["server"]["id"]
        return server_id

    def service(self, host: str) -> dict[str, Any]:
        (found,) = [
            one for one in self.cloud.admin.get(f"/os-services?host={host}")["services"] if one["binary"] == "nova-compute"
        ]
        return dict(found)

    def is_up(self, host: str) -> bool:
        return bool(self.service(host)["state"] == "up")

    def inside(self, host: str, *command: str) -> subprocess.CompletedProcess[str]:
        argv = [INSTAR, "host", "exec", "--dir", self.cloud.directory, host, "--", *command]
        return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)

    def agent_of(self, host: str) -> int:
        """Its process, once there is one."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid in [self.hosts[host].agent] if pid is not None]
            return bool(found)

        wait_until(is_there, AGENT_BACK_MAX_S)
        return found[0]

    def instar(self, *arguments: str) -> None:
        argv = [INSTAR, *arguments, "--dir", self.cloud.directory]
        done = subprocess.run(argv, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def two() -> Iterator[TwoHosts]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with clean_host() as make:
        cloud = make("libvirt", "--hosts", "2")
        cloud.start()
        yield TwoHosts(cloud)


def test_each_guest_runs_on_its_host_and_reaches_the_outside(two: TwoHosts) -> None:
    hypervisors = two.cloud.admin.get("/os-hypervisors/detail")["hypervisors"]
    addresses = {one["hypervisor_hostname"]: one["host_ip"] for one in hypervisors}
    assert set(addresses) == set(HOSTS) and len(set(addresses.values())) == 2
    for name, guest in two.guests.items():
        assert two.cloud.admin.get(f"/servers/{guest.id}")["server"]["OS-EXT-SRV-ATTR:host"] == name
        assert _network_of(guest.process()) == _network_of(two.hosts[name].process)
        assert two.inside(name, "hostname").stdout.strip() == name
    # From a host to the other, and from the namespace through which its guests leave to this machine.
    assert two.inside("host-1", "busybox", "ping", "-c", "1", "-W", "2", addresses["host-2"]).returncode == 0
    (namespace,) = two.inside("host-1", "ls", "/run/netns").stdout.split()
    (machine,) = re.findall(r"via (\S+)", two.inside("host-1", "ip", "route", "show", "default").stdout)
    for target, answers in ((machine, False), (_own_address(), True)):  # guests have no business with the underlay
        ping = two.inside("host-1", "ip", "netns", "exec", namespace, "busybox", "ping", "-c", "1", "-W", "2", target)
        assert (ping.returncode == 0) is answers, ping.stdout
    assert two.cloud.admin.findings() == []


def test_an_agent_that_is_killed_comes_back_to_its_guest(two: TwoHosts) -> None:
    guest, killed = two.guests["host-1"], two.agent_of("host-1")
    process = guest.process()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: two.agent_of("host-1") != killed, AGENT_BACK_MAX_S)
    wait_until(lambda: two.cloud.admin.findings() == [], AGENT_BACK_MAX_S)  # all hosts answer
    assert guest.process() == process
    answer = two.cloud.admin.act(guest.id, {"reboot": {"type": "HARD"}})
    assert answer.status_code == 202, answer.text
    two.cloud.settled(guest.id, "ACTIVE", within_s=ACTIVE_MAX_S)
    assert guest.process() != process


def test_a_host_that_dies_is_down_and_its_guests_are_started_when_it_returns(two: TwoHosts) -> None:
    guest, host = two.guests["host-2"], two.hosts["host-2"]
    boots, process = guest.boots(), guest.process()
    two.instar("host", "power-off", "host-2")
    assert host.process is None and not Path(f"/proc/{process}").exists()
    wait_until(lambda: not two.is_up("host-2"), 20)
    assert two.is_up("host-1")
    two.instar("host", "power-on", "host-2")
    wait_until(lambda: two.is_up("host-2"), AGENT_BACK_MAX_S)
    guest.wait_for_boot(boots + 1)
    two.cloud.settled(guest.id, "ACTIVE", within_s=ACTIVE_MAX_S)
    two.guests["host-1"].wait_for_boot(2)  # its hard reboot went on meanwhile
    assert two.cloud.admin.findings() == []


def test_agents_end_with_the_cloud_and_guests_go_on(two: TwoHosts) -> None:
    before = {name: guest.process() for name, guest in two.guests.items()}
    agents = {name: two.agent_of(name) for name in HOSTS}
    two.cloud.kill()
    wait_until(lambda: not any(host.agent for host in two.hosts.values()), 15)
    two.cloud.start()
    assert {name: guest.process() for name, guest in two.guests.items()} == before
    assert all(two.agent_of(name) != agents[name] for name in HOSTS)
    for guest in two.guests.values():
        two.cloud.settled(guest.id, "ACTIVE")
    assert two.cloud.admin.findings() == []


def test_a_host_without_guests_ends_with_the_cloud(two: TwoHosts) -> None:
    gone, stays = two.guests["host-1"], two.guests["host-2"]
    assert two.cloud.admin.call("DELETE", f"/servers/{gone.id}").status_code == 204
    two.cloud.gone(gone.id, 30)
    process = stays.process()
    assert two.cloud.terminate() == 0
    assert two.hosts["host-1"].process is None
    assert stays.process() == process
    assert two.hosts["host-2"].process is not None
    os.kill(two.hosts["host-2"].process, signal.SIGKILL)  # now nothing of the cloud runs, and much of it is left
    two.cloud.down("--delete")
    assert not [words for _, words in processes() if str(two.cloud.directory) in words]


def _network_of(process: int | None) -> str:
    return str(Path(f"/proc/{process}/ns/net").readlink())


def _own_address() -> str:
    """Of this machine, as the outside sees it."""
    said = subprocess.run(["ip", "-4", "-o", "addr", "show", "scope", "global"], capture_output=True, text=True, check=True)
    found = re.findall(r"^\d+: (\S+) +inet ([0-9.]+)/", said.stdout, re.MULTILINE)
    return next(address for name, address in found if not name.startswith(("ul-", "isu", "isb")))
