"""Guests made of network namespaces, plugged into the networks of a LinuxNetwork as libvirt plugs taps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from instar.hypervisor.linux_network import LinuxNetwork
from instar.hypervisor.linux_network.names import RUN_DIR
from instar.model.network import FixedIp, NetworkDefinition, PortDefinition, SecurityRule, SubnetDefinition

from .own_machine import own_machine

ALLOW_OUT = (SecurityRule("egress", "IPv4"), SecurityRule("egress", "IPv6"))
ALLOW_PING = SecurityRule("ingress", "IPv4", "icmp")
UDHCPC_SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
env > "$RESULT"
ip addr add "$ip/$mask" dev "$interface"
[ -n "$router" ] && ip route add default via "$router"
exit 0
"""
_setns = ctypes.CDLL(None, use_errno=True).setns


def command(*argv: str, check: bool = True, timeout_s: float = 120) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def new_network(cidr: str = "10.91.7.0/24", **facts: object) -> NetworkDefinition:
    gateway = cidr.rsplit(".", 1)[0] + ".1"
    subnet = SubnetDefinition(
        str(uuid.uuid4()), cidr, gateway, dns_nameservers=("192.0.2.53",), host_routes=(("10.200.0.0/16", gateway),)
    )
    return NetworkDefinition(**({"id": str(uuid.uuid4()), "mtu": 1450, "subnets": (subnet,)} | facts))  # type: ignore[arg-type]


def new_port(network: NetworkDefinition, host: int = 10, **facts: object) -> PortDefinition:
    subnet = network.subnets[0]
    address = subnet.cidr.rsplit(".", 1)[0] + f".{host}"
    port = {
        "id": str(uuid.uuid4()),
        "network": network,
        "mac_address": f"fa:16:3e:{secrets.randbelow(256):02x}:{secrets.randbelow(256):02x}:{host:02x}",
        "fixed_ips": (FixedIp(subnet.id, address, 24),),
        "hostname": f"guest-{host}",
        "rules": ALLOW_OUT,
    }
    return PortDefinition(**(port | facts))  # type: ignore[arg-type]


class Guest:
    """A namespace whose eth0 is plugged with the port's MAC; its other end takes the place of the tap, in the
    namespace `host` where the host is one."""

    def __init__(self, port: PortDefinition, bridge: str, *, host: str | None = None) -> None:
        self._host_ip = ["ip", *(["-n", host] if host else [])]
        self.port, self.mac = port, port.mac_address
        self.address = port.fixed_ips[0].ip_address
        self.namespace = f"instartest{secrets.token_hex(4)}"
        command("ip", "netns", "add", self.namespace)
        end = ("peer", "name", "eth0", "netns", self.namespace)
        command(*self._host_ip, "link", "add", port.tap_name, "type", "veth", *end)
        self.run("ip", "link", "set", "eth0", "address", self.mac)
        command(*self._host_ip, "link", "set", port.tap_name, "mtu", "1450", "master", bridge, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "mtu", "1450", "up")

    def run(self, *argv: str, check: bool = True) -> str:
        return command("ip", "netns", "exec", self.namespace, *argv, check=check)

    def configure(self) -> Guest:
        """The port's address and the gateway, as DHCP would set them."""
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "route", "add", "default", "via", self.address.rsplit(".", 1)[0] + ".1")
        return self

    def dhcp(self, folder: Path, *, tries: int = 30) -> dict[str, str]:
        """What a real DHCP client was given; empty when nobody answers."""
        script, result = folder / "udhcpc.sh", folder / f"lease-{secrets.token_hex(3)}"
        script.write_text(UDHCPC_SCRIPT)
        script.chmod(0o755)
        wanted = [word for option in ("mtu", "staticroutes", "dns") for word in ("-O", option)]
        client = ["busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-s", str(script), *wanted]
        self.run("env", f"RESULT={result}", *client, "-t", str(tries), "-T", "1", check=False)
        if not result.exists():
            return {}
        return dict(line.split("=", 1) for line in result.read_text().splitlines() if "=" in line)

    def pings(self, address: str) -> bool:
        return "1 packets received" in self.run("busybox", "ping", "-c", "1", "-W", "1", address, check=False)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        return socket_in(self.namespace, family, kind, protocol)

    def raw(self) -> socket.socket:
        """Sends and receives whole Ethernet frames on eth0."""
        made = self.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind(("eth0", 0))
        return made

    def listen(self, port: int) -> socket.socket:
        made = self.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.bind(("0.0.0.0", port))
        made.listen()
        return made

    def connects(self, address: str, port: int) -> bool:
        with self.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
            return connects(made, address, port)

    def remove(self) -> None:
        command(*self._host_ip, "link", "del", self.port.tap_name, check=False)
        command("ip", "netns", "del", self.namespace, check=False)


def connects(client: socket.socket, address: str, port: int) -> bool:
    client.settimeout(0.6)
    try:
        client.connect((address, port))
    except OSError:
        return False
    return True


def kernel_file(path: str) -> str:
    return Path(path).read_text().strip()


def host_pings(address: str) -> bool:
    return "1 packets received" in command("busybox", "ping", "-c", "1", "-W", "1", address, check=False)


def socket_in(namespace: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket of another namespace: it stays there, whoever uses it."""
    made: list[socket.socket] = []

    def work() -> None:
        with Path(f"/run/netns/{namespace}").open() as handle:
            assert _setns(handle.fileno(), 0) == 0
        made.append(socket.socket(family, kind, protocol))

    thread = threading.Thread(target=work)  # a namespace is a thread's: it ends with it
    thread.start()
    thread.join()
    return made[0]


def arrives(receiver: socket.socket, marker: bytes, within_s: float = 0.25) -> bool:
    """Whether a frame with these bytes in it comes."""
    deadline = time.monotonic() + within_s
    while True:
        left = deadline - time.monotonic()
        receiver.settimeout(max(left, 0.001))  # on a busy machine the time may be over before the first look
        try:
            if marker in receiver.recv(4096):
                return True
        except TimeoutError:
            if left <= 0:
                return False


def host_state() -> dict[str, object]:
    """All that a cloud could leave behind on a host. Of DHCP servers those that see this machine's own directory."""
    processes, ours = [], RUN_DIR.stat().st_dev
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"dnsmasq") and (path / f"root/{RUN_DIR}").stat().st_dev == ours:
                    processes.append(words)
    ruleset = command("nft", "list", "ruleset")
    return {
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "namespaces": sorted(path.name for path in Path("/run/netns").glob("*")),
        "ruleset": ruleset,
        "routes": command("ip", "-4", "route", "show", "table", "all"),
        "dhcp": sorted(processes),
        "files": sorted(str(path) for path in RUN_DIR.rglob("*")),
    }


@pytest.fixture(scope="module", autouse=True)
def machine_of_the_file(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("host") is None:
        yield
        return
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with own_machine():
        yield


MakeCloud = Callable[..., Awaitable[LinuxNetwork]]
Plug = Callable[[LinuxNetwork, PortDefinition], Guest]


@pytest.fixture
async def make_cloud(tmp_path: Path) -> AsyncIterator[MakeCloud]:
    made: list[LinuxNetwork] = []

    async def make(cloud_id: str | None = None, **settings: bool) -> LinuxNetwork:
        cloud_id = cloud_id or secrets.token_hex(3)
        cloud = LinuxNetwork(state_dir=tmp_path / cloud_id, cloud_id=cloud_id, **settings)
        made.append(cloud)
        await cloud.open()
        return cloud

    yield make
    for cloud in made:
        await cloud.remove_everything()


@pytest.fixture
async def cloud(make_cloud: MakeCloud) -> LinuxNetwork:
    return await make_cloud()


@pytest.fixture
def plug(make_cloud: MakeCloud) -> Iterator[Plug]:
    """Plug a guest into a port; unplugged at the end, before its cloud is removed."""
    guests: list[Guest] = []

    def make(cloud: LinuxNetwork, port: PortDefinition) -> Guest:
        guest = Guest(port, cloud.bridge_name(port.network.id))
        guests.append(guest)
        return guest

    yield make
    for guest in guests:
        guest.remove()
