"""Security group rules as nft statements. Ports with the same rules share one pair of chains.

A chain returns what a rule lets through and drops the rest; replies never get here (`ruleset.py`)."""

from __future__ import annotations

import functools
import ipaddress

from instar.hypervisor.linux_network.names import protocol_number
from instar.model.network import SecurityRule

ICMP, ICMPV6 = 1, 58
WITH_PORTS = frozenset({6, 17, 33, 132, 136})  # tcp, udp, dccp, sctp, udplite
# The mark's value for ports that are ours but not filtered: the DHCP server, ports without port security.
UNFILTERED = 1
SOURCE_MASK, TARGET_MASK, SOURCE_SHIFT = 0xFFFF0000, 0x0000FFFF, 16

# Always let through: a port without any rule still gets an address and answers for it. DHCP only with an unfiltered
# port (our server), neighbour discovery of IPv6 only with addresses that the spoofing filter let pass.
_ALWAYS_OUT = (
    f"udp sport 68 udp dport 67 meta mark & {TARGET_MASK:#x} == {UNFILTERED:#x} return",
    "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert, mld-listener-report, "
    "mld-listener-done, mld2-listener-report } return",
)
_ALWAYS_IN = (
    f"udp sport 67 udp dport 68 meta mark & {SOURCE_MASK:#x} == {UNFILTERED << SOURCE_SHIFT:#x} return",
    "icmpv6 type { mld-listener-query, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } return",
)


@functools.lru_cache(maxsize=1024)
def chain_lines(rules: tuple[SecurityRule, ...], direction: str) -> tuple[str, ...]:
    """The body of the chain for one direction: ingress or egress."""
    always = _ALWAYS_IN if direction == "ingress" else _ALWAYS_OUT
    chosen = [rule_line(rule) for rule in rules if rule.direction == direction and not rule.remote_nobody]
    return (*always, *dict.fromkeys(chosen), "drop")


def rule_line(rule: SecurityRule) -> str:
    """One validated rule as one nft statement that returns."""
    version = 4 if rule.ethertype == "IPv4" else 6
    words = [f"meta nfproto ipv{version}"]
    if rule.protocol is not None:
        words += _protocol_words(rule, version)
    if rule.remote_cidrs:
        side = "saddr" if rule.direction == "ingress" else "daddr"
        family = "ip" if version == 4 else "ip6"
        words.append(f"{family} {side} {{ {', '.join(_collapse(rule.remote_cidrs))} }}")
    return " ".join([*words, "return"])


def _protocol_words(rule: SecurityRule, version: int) -> list[str]:
    number = protocol_number(rule.protocol or "")
    if number in (ICMP, ICMPV6):
        # A rule of ethertype IPv6 may say "icmp" and means ICMPv6.
        name, number = ("icmp", ICMP) if version == 4 else ("icmpv6", ICMPV6)
        words = [f"meta l4proto {number}"]
        if rule.port_min is not None:
            words.append(f"{name} type {rule.port_min & 0xFF}")
            if rule.port_max is not None:
                words.append(f"{name} code {rule.port_max & 0xFF}")
        return words
    words = [f"meta l4proto {number}"]
    if number in WITH_PORTS and (rule.port_min is not None or rule.port_max is not None):
        first = rule.port_min if rule.port_min is not None else 0
        last = rule.port_max if rule.port_max is not None else 65535
        words.append(f"th dport {first}" if first == last else f"th dport {first}-{last}")
    return words


def _collapse(cidrs: tuple[str, ...]) -> list[str]:
    """nft refuses a set whose intervals overlap."""
    networks = [ipaddress.ip_network(cidr, strict=False) for cidr in cidrs]
    four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return [str(network) for network in (*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six))]
