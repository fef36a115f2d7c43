"""What guests can and cannot do on real networks of the host, seen in frames and connections."""

from __future__ import annotations

import socket
import struct
import uuid
from pathlib import Path

import msgspec
import pytest

from instar.hypervisor.linux_network import LinuxNetwork
from instar.hypervisor.linux_network.ruleset import link_local
from instar.model.network import SecurityRule

from .conftest import (
    ALLOW_OUT,
    ALLOW_PING,
    Guest,
    MakeCloud,
    Plug,
    arrives,
    command,
    connects,
    host_pings,
    kernel_file,
    new_network,
    new_port,
    socket_in,
)

pytestmark = pytest.mark.host

MARKER = b"instar-test-frame"
SSH = SecurityRule("ingress", "IPv4", "tcp", 22, 22)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071)."""
    padded = data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)


def ipv4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0,
        socket.inet_aton(source), socket.inet_aton(target),
    )  # fmt: skip
    return head[:10] + checksum(head) + head[12:] + payload


def udp(source: int, target: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(payload), 0) + payload


def ipv6(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    """With the checksum that ICMPv6 and UDP must have: a wrong one would be dropped for another reason."""
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    at = 2 if protocol == 58 else 6
    summed = checksum(addresses + struct.pack("!II", len(payload), protocol) + payload)
    payload = payload[:at] + summed + payload[at + 2 :]
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255) + addresses + payload


def frame(source: str, target: str, ethertype: int, payload: bytes) -> bytes:
    return mac_bytes(target) + mac_bytes(source) + struct.pack("!H", ethertype) + payload


def arp(mac: str, address: str, operation: int = 2) -> bytes:
    hardware = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac_bytes(mac) + socket.inet_aton(address)
    return hardware + bytes(6) + socket.inet_aton("10.91.7.99") + MARKER


def spoofs(guest: Guest, victim: Guest) -> dict[str, bytes]:
    """Frames that a guest must not send, each in a form that would reach the victim."""
    me, you = guest.mac, victim.mac
    other_mac, other_ip = "fa:16:3e:ee:ee:ee", "10.91.7.77"
    data = udp(5000, 5001, MARKER)
    advert = struct.pack("!BBHI", 136, 0, 0, 0x60000000)
    lla = str(link_local(me))
    release = bytes([1, 1, 6, 0]) + bytes(24) + mac_bytes(other_mac) + MARKER
    return {
        "another MAC": frame(other_mac, you, 0x0800, ipv4(guest.address, victim.address, 17, data)),
        "another IP": frame(me, you, 0x0800, ipv4(other_ip, victim.address, 17, data)),
        "ARP for another IP": frame(me, you, 0x0806, arp(me, other_ip)),
        "ARP with another MAC": frame(me, you, 0x0806, arp(other_mac, guest.address)),
        "a DHCP server": frame(me, you, 0x0800, ipv4(guest.address, "255.255.255.255", 17, udp(67, 68, MARKER))),
        "DHCP for another MAC": frame(me, you, 0x0800, ipv4("0.0.0.0", "255.255.255.255", 17, udp(68, 67, release))),
        "a router advertisement": frame(me, you, 0x86DD, ipv6(lla, "ff02::1", 58, bytes([134, 0]) + bytes(14) + MARKER)),
        "another IPv6 address": frame(me, you, 0x86DD, ipv6("2001:db8::66", "2001:db8::1", 17, data)),
        "a neighbour advertisement for another": frame(
            me, you, 0x86DD, ipv6(lla, "ff02::1", 58, advert + socket.inet_pton(socket.AF_INET6, "fe80::66") + MARKER)
        ),
        "a VLAN tag": frame(me, you, 0x8100, struct.pack("!HH", 5, 0x0800) + ipv4(other_ip, victim.address, 17, data)),
        "another protocol": frame(me, you, 0x88CC, MARKER),
    }


async def test_each_spoofed_frame_arrives_without_port_security_and_none_with_it(cloud: LinuxNetwork, plug: Plug) -> None:
    network = new_network()
    port, victim_port = new_port(network, 10, port_security=False), new_port(network, 11, port_security=False)
    instance = str(uuid.uuid4())
    await cloud.ensure_ports(instance, (port,))
    await cloud.ensure_ports(str(uuid.uuid4()), (victim_port,))
    guest, victim = plug(cloud, port), plug(cloud, victim_port)
    frames = spoofs(guest, victim)
    with guest.raw() as sender, victim.raw() as receiver:
        for name, content in frames.items():
            sender.send(content)
            assert arrives(receiver, MARKER, 20), f"{name}: does not arrive even unfiltered"
        await cloud.ensure_ports(instance, (msgspec.structs.replace(port, port_security=True),))
        for name, content in frames.items():
            sender.send(content)
            assert not arrives(receiver, MARKER), name
        honest = frame(guest.mac, victim.mac, 0x0800, ipv4(guest.address, victim.address, 17, udp(5000, 5001, MARKER)))
        sender.send(honest)
        assert arrives(receiver, MARKER, 20)
        sender.send(frame(guest.mac, victim.mac, 0x0806, arp(guest.mac, guest.address)))
        assert arrives(receiver, MARKER, 20)


async def test_allowed_pairs_may_be_used_besides_the_own_address(cloud: LinuxNetwork, plug: Plug) -> None:
    network, virtual_mac = new_network(), "00:00:5e:00:01:07"
    pairs = (("10.91.7.64/28", virtual_mac), ("2001:db8:7::/64", virtual_mac))
    port, victim_port = new_port(network, 10, allowed_pairs=pairs), new_port(network, 11, port_security=False)
    await cloud.ensure_ports(str(uuid.uuid4()), (port, victim_port))
    guest, victim = plug(cloud, port), plug(cloud, victim_port)

    def sends(mac: str, address: str) -> bool:
        sender.send(frame(mac, victim.mac, 0x0800, ipv4(address, victim.address, 17, udp(5000, 5001, MARKER))))
        return arrives(receiver, MARKER)

    def advertises(target: str) -> bool:
        body = struct.pack("!BBHI", 136, 0, 0, 0x60000000) + socket.inet_pton(socket.AF_INET6, target) + MARKER
        sender.send(frame(virtual_mac, victim.mac, 0x86DD, ipv6("2001:db8:7::5", "ff02::1", 58, body)))
        return arrives(receiver, MARKER)

    with guest.raw() as sender, victim.raw() as receiver:
        assert sends(guest.mac, guest.address)
        assert sends(virtual_mac, "10.91.7.66")
        assert not sends(virtual_mac, "10.91.7.80"), "outside the pair's CIDR"
        assert not sends(guest.mac, "10.91.7.66"), "the pair's address with another MAC"
        assert advertises("2001:db8:7::5")
        assert not advertises("2001:db8:8::5")


async def test_a_port_without_rules_gets_an_address_and_nothing_else(
    cloud: LinuxNetwork, plug: Plug, tmp_path: Path
) -> None:
    network = new_network()
    silent, peer = new_port(network, 10, rules=()), new_port(network, 11, port_security=False)
    await cloud.ensure_ports(str(uuid.uuid4()), (silent, peer))
    guest, other = plug(cloud, silent), plug(cloud, peer).configure()
    assert guest.dhcp(tmp_path)["ip"] == guest.address
    assert not guest.pings(other.address)
    assert not other.pings(guest.address)
    assert not host_pings(guest.address)
    assert guest.address in other.run("ip", "neigh", "show")
    assert guest.mac in other.run("ip", "neigh", "show"), "ARP is answered"


async def test_the_default_group_lets_nothing_in_but_replies(cloud: LinuxNetwork, plug: Plug) -> None:
    network = new_network()
    one, two = new_port(network, 10), new_port(network, 11, rules=(*ALLOW_OUT, SSH))
    await cloud.ensure_ports(str(uuid.uuid4()), (one,))
    await cloud.ensure_ports(str(uuid.uuid4()), (two,))
    first, second = plug(cloud, one).configure(), plug(cloud, two).configure()
    with first.listen(22), second.listen(22), second.listen(23):
        assert first.connects(second.address, 22), "a rule opens the port, and the replies come back"
        assert not first.connects(second.address, 23)
        assert not second.connects(first.address, 22)
        assert not second.pings(first.address)


async def test_rules_change_while_the_guest_runs(cloud: LinuxNetwork, plug: Plug) -> None:
    network, instance = new_network(), str(uuid.uuid4())
    port, peer = new_port(network, 10), new_port(network, 11)
    await cloud.ensure_ports(str(uuid.uuid4()), (peer,))
    await cloud.ensure_ports(instance, (port,))
    guest, other = plug(cloud, port).configure(), plug(cloud, peer).configure()

    async def reachable(*rules: SecurityRule) -> bool:
        await cloud.ensure_ports(instance, (msgspec.structs.replace(port, rules=(*ALLOW_OUT, *rules)),))
        return other.connects(guest.address, 22)

    with guest.listen(22):
        assert not await reachable()
        assert await reachable(SSH)
        assert await reachable(msgspec.structs.replace(SSH, remote_cidrs=("10.91.7.11/32", "10.91.7.8/29")))
        assert not await reachable(msgspec.structs.replace(SSH, remote_cidrs=("10.91.7.12/32",)))
        assert not await reachable(msgspec.structs.replace(SSH, remote_nobody=True))
        assert not await reachable(msgspec.structs.replace(SSH, ethertype="IPv6"))
        assert await reachable(SecurityRule("ingress", "IPv4", "tcp", 20, 25))
        assert await reachable(SecurityRule("ingress", "IPv4"))


async def test_the_host_reaches_guests_and_guests_not_the_host(cloud: LinuxNetwork, plug: Plug) -> None:
    network = new_network()
    port = new_port(network, rules=(*ALLOW_OUT, ALLOW_PING, SSH))
    await cloud.ensure_ports(str(uuid.uuid4()), (port,))
    guest = plug(cloud, port).configure()
    assert host_pings(guest.address)
    assert guest.pings("10.91.7.1")
    with guest.listen(22), socket.socket() as client:
        assert connects(client, guest.address, 22)
    route = command("ip", "route", "get", guest.address).split()
    link_host_end = route[route.index("src") + 1]
    with socket.socket() as service:
        service.bind(("0.0.0.0", 0))
        service.listen()
        for address in (link_host_end, "127.0.0.1", *command("hostname", "-I").split()[:1]):
            assert not guest.connects(address, service.getsockname()[1]), address
        # Nor by frames to the bridge's own MAC, which no anti-spoofing rule forbids.
        bridge_mac = kernel_file(f"/sys/class/net/{cloud.bridge_name(network.id)}/address")
        guest.run("ip", "route", "replace", "default", "via", "10.91.7.200", "dev", "eth0", "onlink")
        guest.run("ip", "neigh", "replace", "10.91.7.200", "lladdr", bridge_mac, "dev", "eth0", "nud", "permanent")
        assert not guest.connects(link_host_end, service.getsockname()[1])


async def test_guests_reach_the_outside_through_the_host_under_its_address(
    make_cloud: MakeCloud, cloud: LinuxNetwork, plug: Plug
) -> None:
    """The outside is a namespace behind another interface of the host."""
    network, outer = new_network(), f"instartest{uuid.uuid4().hex[:8]}"
    port = new_port(network)
    await cloud.ensure_ports(str(uuid.uuid4()), (port,))
    guest = plug(cloud, port).configure()
    inside_only = await make_cloud(outside=False)
    kept = new_port(new_network("10.91.8.0/24"))
    await inside_only.ensure_ports(str(uuid.uuid4()), (kept,))
    kept_guest = plug(inside_only, kept).configure()
    command("ip", "netns", "add", outer)
    try:
        command("ip", "link", "add", outer[-14:], "type", "veth", "peer", "name", "eth0", "netns", outer)
        command("ip", "addr", "add", "198.51.100.1/30", "dev", outer[-14:])
        command("ip", "link", "set", outer[-14:], "up")
        command("ip", "-n", outer, "addr", "add", "198.51.100.2/30", "dev", "eth0")
        command("ip", "-n", outer, "link", "set", "eth0", "up")
        with socket_in(outer, socket.AF_INET, socket.SOCK_STREAM) as service:
            service.bind(("198.51.100.2", 8080))
            service.listen()
            service.settimeout(30)
            assert guest.connects("198.51.100.2", 8080)
            assert service.accept()[1][0] == "198.51.100.1"
            assert not kept_guest.connects("198.51.100.2", 8080)
            # Nobody outside may use the host as a router to the guests.
            command("ip", "-n", outer, "route", "add", "10.91.7.0/24", "via", "198.51.100.1")
            await cloud.ensure_ports(str(uuid.uuid4()), (new_port(network, 40),))
            open_port = new_port(network, 41, rules=(SecurityRule("ingress", "IPv4"), *ALLOW_OUT))
            await cloud.ensure_ports(str(uuid.uuid4()), (open_port,))
            other = plug(cloud, open_port).configure()
            assert host_pings(other.address)
            argv = ["ip", "netns", "exec", outer, "busybox", "ping", "-c", "1", "-W", "1", other.address]
            assert "0 packets received" in command(*argv, check=False)
    finally:
        command("ip", "link", "del", outer[-14:], check=False)
        command("ip", "netns", "del", outer, check=False)


async def test_two_networks_with_the_same_addresses_do_not_see_each_other(cloud: LinuxNetwork, plug: Plug) -> None:
    everything = (*ALLOW_OUT, SecurityRule("ingress", "IPv4"))
    red, blue = new_network(), new_network()
    ports = [new_port(red, 10, rules=everything), new_port(red, 11, rules=everything)]
    ports += [new_port(blue, 10, rules=everything), new_port(blue, 12, rules=everything)]
    await cloud.ensure_ports(str(uuid.uuid4()), tuple(ports))
    red_10, red_11, blue_10, blue_12 = (plug(cloud, port).configure() for port in ports)
    assert red_10.pings("10.91.7.11")
    assert blue_10.pings("10.91.7.12")
    assert not red_10.pings("10.91.7.12")
    assert not blue_10.pings("10.91.7.11")
    with red_11.listen(80), blue_12.listen(81):
        assert red_10.connects("10.91.7.11", 80)
        assert not blue_12.connects("10.91.7.11", 80)
        assert not red_10.connects("10.91.7.12", 81)


async def test_guests_of_two_networks_do_not_meet_through_the_host(
    make_cloud: MakeCloud, cloud: LinuxNetwork, plug: Plug
) -> None:
    everything = (*ALLOW_OUT, SecurityRule("ingress", "IPv4"))
    red, blue, foreign = new_network(), new_network("10.91.8.0/24"), new_network("10.91.9.0/24")
    neighbour = await make_cloud()
    ports = [new_port(network, rules=everything) for network in (red, blue)]
    foreign_port = new_port(foreign, rules=everything)
    await cloud.ensure_ports(str(uuid.uuid4()), tuple(ports))
    await neighbour.ensure_ports(str(uuid.uuid4()), (foreign_port,))
    one, two = (plug(cloud, port).configure() for port in ports)
    three = plug(neighbour, foreign_port).configure()
    for guest in (one, two, three):
        assert host_pings(guest.address)
        assert not any(guest.pings(other.address) for other in (one, two, three) if other is not guest)
