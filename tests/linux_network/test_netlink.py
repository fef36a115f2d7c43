"""What the kernel tells over netlink is what the program `ip` says."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.hypervisor.linux_network import netlink
from instar.hypervisor.linux_network.names import NETNS_DIR
from tests.linux_network.conftest import command

pytestmark = pytest.mark.host


@pytest.fixture
def namespace() -> Iterator[Path]:
    name = f"nl-{secrets.token_hex(3)}"
    command("ip", "netns", "add", name)
    try:
        for words in (
            "link set lo up",
            "link add b0 type bridge",
            "link set b0 address 02:00:00:00:00:07 up",
            "link add b1 type bridge",
            "addr add 10.1.2.3/24 dev b0",
            "addr add 10.1.9.3/30 dev b0",
            "addr add 10.7.0.1/16 dev b1",
            "route add 10.200.0.0/16 via 10.1.2.9",
            "route add default via 10.1.2.8",
            "route add 10.201.0.0/16 dev b0 table 77",
            "route add unreachable 10.202.0.0/16",
        ):
            command("ip", "-n", name, *words.split())
        yield NETNS_DIR / name
    finally:
        command("ip", "netns", "del", name)


def test_interfaces_and_routes_of_a_namespace_are_those_that_ip_shows(namespace: Path) -> None:
    interfaces = {one.name: one for one in netlink.inside(namespace, netlink.interfaces)}
    assert interfaces["b0"].addresses == ("10.1.2.3/24", "10.1.9.3/30")
    assert (interfaces["b0"].mac, interfaces["b0"].is_up) == ("02:00:00:00:00:07", True)
    assert (interfaces["b1"].addresses, interfaces["b1"].is_up) == (("10.7.0.1/16",), False)
    found = netlink.inside(namespace, netlink.routes)
    shown = set()
    for entry in json.loads(command("ip", "-n", namespace.name, "-4", "-j", "route", "show", "table", "all")):
        destination = "0.0.0.0/0" if entry["dst"] == "default" else entry["dst"]
        shown.add((ipaddress.IPv4Network(destination), entry.get("dev", "")))
    assert {(network, device) for network, device in found if not network.is_multicast} >= shown
    assert (ipaddress.IPv4Network("10.201.0.0/16"), "b0") in shown


def test_who_asks_stays_where_it_is_and_a_namespace_that_is_gone_is_an_error(namespace: Path) -> None:
    before = Path("/proc/thread-self/ns/net").readlink()
    assert netlink.inside(namespace, lambda: Path("/proc/thread-self/ns/net").readlink()) != before
    assert Path("/proc/thread-self/ns/net").readlink() == before
    with pytest.raises(OSError, match="No such file"):
        netlink.inside(namespace.with_name("nl-none"), netlink.interfaces)
    with pytest.raises(ZeroDivisionError):
        netlink.inside(namespace, lambda: 1 // 0)
