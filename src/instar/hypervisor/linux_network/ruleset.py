"""The packet filter of one cloud on one host, rendered whole from what is in memory and loaded in one transaction.

Table `bridge instar_TAG`: nobody spoofs (by tap name, so it holds before the tap exists), and each frame gets a mark:
upper half the security group chain of the port it comes from, lower half that of the port it goes to. Table
`inet instar_TAG`: the stateful half; bridged IP packets come through it because our bridges have nf_call_iptables on.
Ports are elements of sets and maps and chains are shared, so that a hundred ports load in milliseconds."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

import msgspec

from instar.hypervisor.linux_network.links import Link
from instar.hypervisor.linux_network.names import ANY_BRIDGE, ANY_UPLINK, CloudNames
from instar.hypervisor.linux_network.security_groups import (
    SOURCE_MASK,
    SOURCE_SHIFT,
    TARGET_MASK,
    UNFILTERED,
    chain_lines,
)
from instar.model.network import PortDefinition, SecurityRule

GROUPS_MAX = 0xFFFF
# Link-local addresses outside: the metadata service of a cloud that this host is itself a guest of.
NOT_FOR_GUESTS = "169.254.0.0/16"


class GroupNumbers:
    """A number for each distinct tuple of rules. Numbers are never used again while the process lives, so that a packet
    marked under the old ruleset is not judged by the chain of another group under the new one."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._next = UNFILTERED + 1

    def number(self, port: PortDefinition) -> int:
        if not port.port_security:
            return UNFILTERED
        key = msgspec.json.encode(port.rules)
        known = self._numbers.get(key)
        if known is None:
            if self._next > GROUPS_MAX:  # after 65,000 changes of rules: begin again
                self._numbers.clear()
                self._next = UNFILTERED + 1
            known = self._numbers[key] = self._next
            self._next += 1
        return known


def empty_ruleset(names: CloudNames) -> str:
    """Removes what there is; no error when there is nothing."""
    return "".join(
        f"add table {family} {names.table}\ndelete table {family} {names.table}\n" for family in ("bridge", "inet")
    )


def render_ruleset(
    names: CloudNames,
    ports: Iterable[PortDefinition],
    links: Mapping[str, Link],
    groups: GroupNumbers,
    *,
    outside: bool,
) -> str:
    """The whole filter of the cloud. `links` holds each network that stands on this host, by its id."""
    ports = sorted(ports, key=lambda port: port.id)
    if not ports and not links:
        return empty_ruleset(names)
    numbers = {port.id: groups.number(port) for port in ports}
    rules = {numbers[port.id]: port.rules for port in ports if port.port_security}
    bridge = _bridge_table(names, ports, numbers, sorted(links))
    inet = _inet_table(names, rules, links, outside=outside)
    return empty_ruleset(names) + "\n".join([*bridge, *inet]) + "\n"


# --- family bridge: who may say what, and the marks -----------------------------------------------------------------

_SPOOF_CHAINS = """
chain spoof4 {
ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 iifname . @th,288,48 @clients return
udp dport 68 drop
udp sport 68 udp dport 67 iifname . @th,288,48 != @clients drop
iifname . ether saddr . ip saddr @own4 return
iifname . ether saddr . ip saddr @pairs4 return
drop
}
chain spoof_arp {
arp operation != { request, reply } drop
iifname . arp saddr ether != @macs drop
arp operation request arp saddr ip 0.0.0.0 return
iifname . arp saddr ether . arp saddr ip @own4 return
iifname . arp saddr ether . arp saddr ip @pairs4 return
drop
}
chain spoof6 {
icmpv6 type { nd-router-advert, nd-redirect } drop
udp dport 546 drop
ip6 saddr :: icmpv6 type { nd-neighbor-solicit, nd-router-solicit, mld-listener-report, mld2-listener-report } return
icmpv6 type nd-neighbor-advert iifname . @th,64,128 @targets6 return
icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @pair_targets6 drop
iifname . ether saddr . ip6 saddr @own6 return
iifname . ether saddr . ip6 saddr @pairs6 return
drop
}
chain spoof {
iifname . ether saddr != @macs drop
ether type vmap { ip : goto spoof4, arp : goto spoof_arp, ip6 : goto spoof6, 0x8035 : return }
drop
}
"""


class _Elements:
    """The elements of the sets against spoofing, collected port by port."""

    def __init__(self) -> None:
        self.macs: list[str] = []
        self.clients: list[str] = []
        self.own4: list[str] = []
        self.own6: list[str] = []
        self.pairs4: list[str] = []
        self.pairs6: list[str] = []
        self.targets6: list[str] = []
        self.pair_targets6: list[str] = []

    def add(self, port: PortDefinition) -> None:
        tap, mac = f'"{port.tap_name}"', port.mac_address.lower()
        pairs = [(ipaddress.ip_network(cidr, strict=False), pair_mac.lower()) for cidr, pair_mac in port.allowed_pairs]
        for each in dict.fromkeys([mac, *(pair_mac for _, pair_mac in pairs)]):
            self.macs.append(f"{tap} . {each}")
            self.clients.append(f"{tap} . 0x{each.replace(':', '')}")
        addresses = [ipaddress.ip_address(fixed.ip_address) for fixed in port.fixed_ips]
        for address in dict.fromkeys([*addresses, link_local(mac)]):
            if address.version == 4:
                self.own4.append(f"{tap} . {mac} . {address}")
            else:
                self.own6.append(f"{tap} . {mac} . {address}")
                self.targets6.append(f"{tap} . {int(address):#034x}")
        for version, into in ((4, self.pairs4), (6, self.pairs6)):
            for pair_mac in dict.fromkeys(pair_mac for _, pair_mac in pairs):
                for cidr in collapse(network for network, owner in pairs if owner == pair_mac):
                    if cidr.version == version:
                        into.append(f"{tap} . {pair_mac} . {cidr}")
        for cidr in collapse(network for network, _ in pairs if network.version == 6):
            first, last = int(cidr.network_address), int(cidr.broadcast_address)
            self.pair_targets6.append(f"{tap} . {first:#034x}-{last:#034x}")


def link_local(mac: str) -> ipaddress.IPv6Address:
    """The IPv6 link-local address that a guest makes of its MAC (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    interface = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + interface)


def collapse(
    networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network],
) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The same addresses in networks that do not overlap."""
    listed = list(networks)
    four = (network for network in listed if isinstance(network, ipaddress.IPv4Network))
    six = (network for network in listed if isinstance(network, ipaddress.IPv6Network))
    return [*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six)]


def _set(name: str, kind: str, elements: Iterable[str]) -> str:
    """A set or a map; nft refuses an empty list of elements."""
    listed = ", ".join(elements)
    return f"{name} {{ {kind};" + (f" elements = {{ {listed} }};" if listed else "") + " }"


def _bridge_table(
    names: CloudNames, ports: list[PortDefinition], numbers: Mapping[str, int], network_ids: list[str]
) -> list[str]:
    secured = [port for port in ports if port.port_security]
    elements = _Elements()
    for port in secured:
        elements.add(port)
    of_port = [(port.tap_name, numbers[port.id]) for port in ports]
    of_port += [(names.server(network_id), UNFILTERED) for network_id in network_ids]
    lines = [f"table bridge {names.table} {{"]
    lines += [f"chain to_{number} {{\nmeta mark set meta mark or {number:#x}\n}}" for number in _used(of_port)]
    lines += [
        _set("set ports", "type ifname", (f'"{interface}"' for interface, _ in of_port)),
        _set("set secured", "type ifname", (f'"{port.tap_name}"' for port in secured)),
        _set("set macs", "type ifname . ether_addr", elements.macs),
        _set("set clients", "typeof iifname . @th,288,48", elements.clients),
        _set("set own4", "type ifname . ether_addr . ipv4_addr", elements.own4),
        _set("set own6", "type ifname . ether_addr . ipv6_addr", elements.own6),
        _set("set pairs4", "type ifname . ether_addr . ipv4_addr; flags interval", elements.pairs4),
        _set("set pairs6", "type ifname . ether_addr . ipv6_addr; flags interval", elements.pairs6),
        _set("set targets6", "typeof iifname . @th,64,128", elements.targets6),
        _set("set pair_targets6", "typeof iifname . @th,64,128; flags interval", elements.pair_targets6),
        _set("map sources", "type ifname : mark", (f'"{name}" : {n << SOURCE_SHIFT:#x}' for name, n in of_port)),
        _set("map targets", "type ifname : verdict", (f'"{name}" : jump to_{n}' for name, n in of_port)),
        _SPOOF_CHAINS.strip(),
        "chain prerouting {\ntype filter hook prerouting priority -200; policy accept;",
        "meta mark set iifname map @sources\niifname @secured jump spoof\n}",
        "chain forward {\ntype filter hook forward priority -200; policy accept;\noifname vmap @targets\n}",
        # Guests have no business with the host itself, by whatever protocol: the bridge is not an address of the host.
        "chain input {\ntype filter hook input priority -200; policy accept;\niifname @ports drop\n}",
        "}",
    ]
    return lines


def _used(of_port: list[tuple[str, int]]) -> list[int]:
    return sorted({number for _, number in of_port})


# --- family inet: security groups, the host, the outside ------------------------------------------------------------


def _inet_table(
    names: CloudNames, rules: Mapping[int, tuple[SecurityRule, ...]], links: Mapping[str, Link], *, outside: bool
) -> list[str]:
    lines = [f"table inet {names.table} {{"]
    for number, group in sorted(rules.items()):
        for direction in ("egress", "ingress"):
            lines += [f"chain {direction}_{number} {{", *chain_lines(group, direction), "}"]
    egress = (f"{number << SOURCE_SHIFT:#x} : jump egress_{number}" for number in sorted(rules))
    ingress = (f"{number:#x} : jump ingress_{number}" for number in sorted(rules))
    zones = (f'"{names.bridge(network_id)}" : {link.zone}' for network_id, link in sorted(links.items()))
    own_links = (str(link.inner_address) for _, link in sorted(links.items()))
    lines += [
        _set("map egress", "type mark : verdict", egress),
        _set("map ingress", "type mark : verdict", ingress),
        _set("map zones", "typeof iifname : ct zone", zones),
        _set("set links", "type ipv4_addr", own_links),
        # A zone for each network: two networks may use the same addresses.
        "chain zone {\ntype filter hook prerouting priority -300; policy accept;\nct zone set iifname map @zones\n}",
        *_bridged_chain(),
        *_host_chains(names, outside=outside),
        "}",
    ]
    return lines


def _bridged_chain() -> list[str]:
    unfiltered = UNFILTERED << SOURCE_SHIFT | UNFILTERED
    return [
        "chain bridged {",
        f"meta mark & {SOURCE_MASK:#x} == 0 drop",  # from or to a port that nobody told us of
        f"meta mark & {TARGET_MASK:#x} == 0 drop",
        f"meta mark {unfiltered:#x} accept",
        "ct state established,related accept",
        "ct state invalid drop",
        f"meta mark & {SOURCE_MASK:#x} vmap @egress",
        f"meta mark & {TARGET_MASK:#x} vmap @ingress",
        "accept",
        "}",
    ]


def _host_chains(names: CloudNames, *, outside: bool) -> list[str]:
    return [
        "chain from_guests {",
        "ip saddr != @links drop",  # only what its namespace has translated
        f'oifname {{ "{ANY_UPLINK}", "{ANY_BRIDGE}" }} drop',
        f"ip daddr {NOT_FOR_GUESTS} drop",
        "accept" if outside else "drop",
        "}",
        "chain to_guests {\nct state established,related accept\ndrop\n}",
        "chain to_host {\nct state established,related accept\nicmp type echo-request accept\ndrop\n}",
        "chain input {\ntype filter hook input priority -10; policy accept;",
        f'iifname "{names.bridges}" drop\niifname "{names.uplinks}" goto to_host\n}}',
        "chain forward {\ntype filter hook forward priority -10; policy accept;",
        f'iifname "{names.bridges}" oifname "{names.bridges}" goto bridged',
        f'iifname "{names.bridges}" drop\noifname "{names.bridges}" drop',
        f'iifname "{names.uplinks}" goto from_guests\noifname "{names.uplinks}" goto to_guests\n}}',
        "chain source_nat {\ntype nat hook postrouting priority 100; policy accept;",
        f'ip saddr @links oifname != "{ANY_UPLINK}" masquerade\n}}',
    ]
