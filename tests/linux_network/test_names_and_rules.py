"""Names, link addresses and rules, without a host."""

from __future__ import annotations

import ipaddress
import uuid

import pytest

from instar.errors import HypervisorError
from instar.hypervisor.linux_network.dhcp import render_config, render_hosts
from instar.hypervisor.linux_network.links import LINKS_MAX, HostRoute, Link, choose_link, overlapping
from instar.hypervisor.linux_network.names import RUN_DIR, CloudNames, dhcp_hostname
from instar.hypervisor.linux_network.security_groups import chain_lines, rule_line
from instar.model.network import FixedIp, NetworkDefinition, PortDefinition, SecurityRule, SubnetDefinition


@pytest.mark.parametrize("cloud_id", ["abcd", "abc123", "abcdef0123456789"])
def test_names_fit_the_kernel_and_tell_clouds_and_networks_apart(cloud_id: str) -> None:
    names, other = CloudNames(cloud_id), CloudNames("f" + cloud_id)
    networks = [str(uuid.uuid4()) for _ in range(500)]
    made = [name(n) for n in networks for name in (names.bridge, names.server, names.uplink)]
    assert all(len(name) == 15 for name in made)
    assert len(set(made)) == len(made)
    assert all(names.owns_interface(name) and not other.owns_interface(name) for name in made)
    namespace = names.namespace(networks[0])
    assert (names.network_of_namespace(namespace), other.network_of_namespace(namespace)) == (networks[0], None)


@pytest.mark.parametrize(
    ("given", "handed_out"),
    [("Web-1.example.org", "web-1"), ("a,ignore\n", "aignore"), ("ignore", ""), ("45m", ""), ("-x-", "x"), ("żółw", "w")],
)
def test_hostnames_are_cut_to_what_dnsmasq_cannot_misread(given: str, handed_out: str) -> None:
    assert dhcp_hostname(given) == handed_out


def test_a_link_is_the_next_one_that_no_route_of_the_host_touches() -> None:
    def route(cidr: str) -> HostRoute:
        return HostRoute(ipaddress.IPv4Network(cidr), "eth0")

    assert choose_link(5, [], []).index == 5
    assert choose_link(5, [route("169.254.0.0/16")], []).index == 5, "zeroconf's route is less specific"
    assert choose_link(5, [route("169.254.64.20/30"), route("169.254.64.25/32")], [7]).index == 8
    assert choose_link(LINKS_MAX - 1, [], [LINKS_MAX - 1]).index == 0
    with pytest.raises(HypervisorError):
        choose_link(0, [], range(LINKS_MAX))
    assert str(Link(1).host_address), str(Link(1).inner_address) == ("169.254.64.5", "169.254.64.6")


def test_only_routes_of_other_devices_are_in_the_way() -> None:
    subnet = ipaddress.IPv4Network("10.1.0.0/16")
    routes = [HostRoute(subnet, "isu1"), HostRoute(ipaddress.IPv4Network("10.0.0.0/8"), "eth0")]
    assert overlapping(subnet, routes[:1], but_for="isu1") is None
    assert overlapping(subnet, routes, but_for="isu1") == routes[1]


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (SecurityRule("egress", "IPv4"), "meta nfproto ipv4 return"),
        (SecurityRule("ingress", "IPv4", "tcp", 22, 22), "meta nfproto ipv4 meta l4proto 6 th dport 22 return"),
        (SecurityRule("ingress", "IPv6", "udp", 1, 9), "meta nfproto ipv6 meta l4proto 17 th dport 1-9 return"),
        (SecurityRule("ingress", "IPv4", "icmp", 8, 0), "meta nfproto ipv4 meta l4proto 1 icmp type 8 icmp code 0 return"),
        (SecurityRule("ingress", "IPv6", "icmp", 128), "meta nfproto ipv6 meta l4proto 58 icmpv6 type 128 return"),
        (SecurityRule("ingress", "IPv4", "112"), "meta nfproto ipv4 meta l4proto 112 return"),
        (
            SecurityRule("ingress", "IPv4", remote_cidrs=("10.0.0.0/25", "10.0.0.128/25", "10.0.0.7/32")),
            "meta nfproto ipv4 ip saddr { 10.0.0.0/24 } return",
        ),
        (
            SecurityRule("egress", "IPv6", remote_cidrs=("fe80::/64",)),
            "meta nfproto ipv6 ip6 daddr { fe80::/64 } return",
        ),
    ],
)
def test_a_rule_becomes_one_statement(rule: SecurityRule, line: str) -> None:
    assert rule_line(rule) == line


def test_a_rule_for_nobody_lets_nobody_through() -> None:
    rule = SecurityRule("ingress", "IPv4", "tcp", 22, 22, remote_nobody=True)
    assert chain_lines((rule,), "ingress") == chain_lines((), "ingress")
    assert chain_lines((), "ingress")[-1] == "drop"


def network(**facts: object) -> NetworkDefinition:
    subnet = SubnetDefinition(**({"id": "s", "cidr": "10.0.0.0/24", "gateway_ip": "10.0.0.1"} | facts))  # type: ignore[arg-type]
    return NetworkDefinition(str(uuid.uuid4()), 1450, (subnet,), nat=False)


def test_options_without_a_value_keep_dnsmasq_from_offering_its_own() -> None:
    config = render_config(network(gateway_ip=None, dhcp_ip="10.0.0.2"), RUN_DIR).splitlines()
    assert "dhcp-option=tag:s0,option:router" in config
    assert "dhcp-option=tag:s0,option:dns-server" in config
    assert not any("121" in line for line in config)


def test_ports_outside_a_subnet_with_dhcp_are_not_in_the_hosts_file() -> None:
    served = network()
    port = PortDefinition(str(uuid.uuid4()), served, "FA:16:3E:00:00:01", (FixedIp("s", "10.0.0.9", 24),), hostname="45m")
    assert render_hosts(served, [port]) == "fa:16:3e:00:00:01,10.0.0.9\n"
    assert render_hosts(network(dhcp_enabled=False), [port]) == ""
    assert render_hosts(network(gateway_ip=None), [port]) == "", "no address for the server"
