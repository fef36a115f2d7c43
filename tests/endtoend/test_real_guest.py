"""A real guest through its whole life, as its owner sees it and as it is seen from the host."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.endtoend.guest_access import Guest, domains_of
from tests.endtoend.openstack_shell import OpenstackShell
from tests.endtoend.running_cloud import RunningCloud, wait_until

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]

USER_DATA = """\
#!/bin/sh
echo "user data on $(hostname)" > /root/user-data-ran
"""


@pytest.fixture(scope="module")
def demo(libvirt_cloud: RunningCloud) -> OpenstackShell:
    return libvirt_cloud.shell("instar-demo", OS_COMPUTE_API_VERSION="2.96")


def test_a_guest_through_its_life(libvirt_cloud: RunningCloud, demo: OpenstackShell, tmp_path: Path) -> None:
    guest = create(libvirt_cloud, demo, tmp_path, "first")
    check_first_boot(guest, demo)
    guest.ssh("echo precious > /root/kept; sync")
    check_soft_reboot(guest, demo)
    check_hard_reboot_brings_back_the_nic(guest, demo)
    check_hard_reboot_brings_back_the_domain(guest, demo)
    check_stop_and_start(guest, demo)
    check_power_off_from_inside(guest)
    check_killed_from_outside(guest, demo)
    remove(guest, demo)


def test_security_groups_keep_closed_ports_closed(
    libvirt_cloud: RunningCloud, demo: OpenstackShell, tmp_path: Path
) -> None:
    """The door is open for ping alone: ssh listens, and cannot be reached before a rule says so, and while it says so."""
    demo.show("security group create ping-only")
    demo.show("security group rule create --protocol icmp ping-only")
    guest = create(libvirt_cloud, demo, tmp_path, "second", "--security-group", "ping-only")
    guest.wait_for_boot(1)
    wait_until(guest.pings, 10)
    assert not door_is_open(guest)
    rule = demo.show("security group rule create --protocol tcp --dst-port 22 ping-only")
    wait_until(lambda: door_is_open(guest), 10)
    demo.do("security group rule delete", rule["id"])
    wait_until(lambda: not door_is_open(guest), 10)
    assert guest.pings()
    remove(guest, demo)
    demo.do("security group delete ping-only")


def create(cloud: RunningCloud, demo: OpenstackShell, folder: Path, name: str, *more: str) -> Guest:
    key, user_data = folder / f"{name}-key", folder / "user-data"
    demo.show("keypair create --private-key", str(key), name)
    key.chmod(0o600)
    user_data.write_text(USER_DATA)
    made = demo.show(
        "server create --image tiny --flavor m1.nano --network private --config-drive true --wait",
        "--key-name", name, "--user-data", str(user_data), *more, name,
    )  # fmt: skip
    assert made["status"] == "ACTIVE"
    return Guest(cloud, made["id"], key)


def check_first_boot(guest: Guest, demo: OpenstackShell) -> None:
    guest.wait_for_boot(1)
    assert f"INSTAR-BOOT count=1 uuid={guest.id} hostname=first" in guest.console()
    assert f"INSTAR-NET eth0 address={guest.address}/" in guest.console()
    assert not guest.pings(), "the default security group lets nobody in"
    demo.show("security group rule create --protocol icmp default")
    demo.show("security group rule create --protocol tcp --dst-port 22 default")
    wait_until(guest.pings, 10)
    assert guest.ssh("hostname") == "first"
    guest.wait_for_line("INSTAR-USER-DATA exit=0")
    assert guest.ssh("cat /root/user-data-ran") == "user data on first"
    shown = demo.said("console", "log", "show", "--lines", "500", "first")
    assert "INSTAR-READY count=1" in shown


def check_soft_reboot(guest: Guest, demo: OpenstackShell) -> None:
    """The guest itself went down and came up: nothing was pulled from under it."""
    before = guest.domain_id
    assert "Complete" in demo.said("server", "reboot", "--soft", "--wait", "first")
    guest.wait_for_boot(2)
    assert guest.domain_id != before
    assert guest.ssh("cat /root/kept") == "precious"
    steps = events_of_newest(guest)
    assert "shut down guest" in steps and "restart guest" not in steps, "a soft reboot went on as a hard one"


def check_hard_reboot_brings_back_the_nic(guest: Guest, demo: OpenstackShell) -> None:
    guest.lose_nic()
    assert not guest.pings()
    assert "Complete" in demo.said("server", "reboot", "--hard", "--wait", "first")
    assert len(guest.nics()) == 1
    guest.wait_for_boot(3)
    wait_until(guest.pings, 10)
    assert guest.ssh("cat /root/kept") == "precious"


def check_hard_reboot_brings_back_the_domain(guest: Guest, demo: OpenstackShell) -> None:
    guest.lose_domain()
    guest.cloud.settled(guest.id, "SHUTOFF")
    assert guest.cloud.admin.act(guest.id, {"reboot": {"type": "HARD"}}).status_code == 202
    guest.cloud.settled(guest.id, "ACTIVE")
    guest.wait_for_boot(4)
    assert guest.ssh("cat /root/kept") == "precious"


def check_stop_and_start(guest: Guest, demo: OpenstackShell) -> None:
    demo.do("server stop first")
    server = guest.cloud.settled(guest.id, "SHUTOFF", within_s=30)
    assert server["OS-EXT-STS:power_state"] == 4
    demo.do("server start first")
    assert guest.cloud.settled(guest.id, "ACTIVE")["OS-EXT-STS:power_state"] == 1
    guest.wait_for_boot(5)
    assert guest.ssh("cat /root/kept") == "precious", "a clean shutdown wrote the disk"


def check_power_off_from_inside(guest: Guest) -> None:
    guest.ssh("poweroff", may_end=True)
    guest.cloud.settled(guest.id, "SHUTOFF", within_s=30)
    newest = actions_of(guest)[0]
    assert newest["action"] == "power-sync" and "stopped" in newest["message"]


def check_killed_from_outside(guest: Guest, demo: OpenstackShell) -> None:
    demo.do("server start first")
    guest.cloud.settled(guest.id, "ACTIVE")
    guest.kill_process()
    guest.cloud.settled(guest.id, "SHUTOFF")
    assert actions_of(guest)[0]["action"] == "power-sync"


def remove(guest: Guest, demo: OpenstackShell) -> None:
    name = guest.cloud.admin.get(f"/servers/{guest.id}")["server"]["name"]
    demo.do("server delete", name)
    guest.cloud.gone(guest.id)
    demo.do("keypair delete", name)
    assert guest.id not in domains_of(guest.cloud)
    assert not (guest.cloud.directory / "instances" / guest.id).exists()
    wait_until(lambda: guest.cloud.admin.findings() == [], 10)


def door_is_open(guest: Guest) -> bool:
    try:
        with socket.create_connection((guest.address, 22), timeout=2) as connection:
            return connection.recv(8).startswith(b"SSH-2.0")
    except OSError:
        return False


def actions_of(guest: Guest) -> list[dict[str, str]]:
    actions: list[dict[str, str]] = guest.cloud.admin.get(f"/servers/{guest.id}/os-instance-actions")["instanceActions"]
    return actions


def events_of_newest(guest: Guest) -> list[str]:
    request_id = actions_of(guest)[0]["request_id"]
    action = guest.cloud.admin.get(f"/servers/{guest.id}/os-instance-actions/{request_id}")["instanceAction"]
    return [event["event"] for event in action["events"]]
