"""The packet filter of one cloud on one host, rendered whole from what is in memory and loaded in one transaction.

Table `bridge instar_TAG`: nobody spoofs (by tap name, so it holds before the tap exists), and each frame gets a mark:
upper half the security group chain of the port it comes from, lower half that of the port it goes to. Table
`inet instar_TAG`: the stateful half; bridged IP packets come through it because our bridges have nf_call_iptables on.
Ports are elements of sets and maps and chains are shared. So what a change of one port costs hardly depends on how many
ports there are: `change` writes only the difference to what was loaded, `whole` everything; both are one transaction."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from instar.hypervisor.linux_network.links import Link
from instar.hypervisor.linux_network.names import ANY_BRIDGE, ANY_UPLINK, CloudNames
from instar.hypervisor.linux_network.security_groups import (
    SOURCE_MASK,
    SOURCE_SHIFT,
    TARGET_MASK,
    UNFILTERED,
    chain_lines,
)
from instar.hypervisor.linux_network.tunnel import VXLAN_PORT
from instar.model.network import PortDefinition, SecurityRule

GROUPS_MAX = 0xFFFF
# Link-local addresses outside: the metadata service of a cloud that this host is itself a guest of.
NOT_FOR_GUESTS = "169.254.0.0/16"


Elements = dict[str, dict[str, str]]  # by set or map: key -> value, empty for the elements of a set


class Table(NamedTuple):
    """One nft table: `sets` by name with their type, `leaves` the chains that come and go with security groups."""

    family: str
    sets: Mapping[str, str]
    elements: Elements
    leaves: Mapping[str, tuple[str, ...]]
    fixed: str


class Ruleset(NamedTuple):
    """The filter of a cloud, as it should be in the kernel."""

    name: str
    tables: tuple[Table, ...]

    def whole(self) -> str:
        """Text for nft that replaces whatever there is."""
        return empty_ruleset(self.name) + "".join(self._table(table) for table in self.tables)

    def change(self, old: Ruleset) -> str | None:
        """Text for nft that makes this of `old`: empty when they are the same, None when only `whole` can."""
        if [(t.family, t.sets, t.fixed) for t in self.tables] != [(t.family, t.sets, t.fixed) for t in old.tables]:
            return None
        return "".join(self._table_change(now, before) for now, before in zip(self.tables, old.tables, strict=True))

    def _table(self, table: Table) -> str:
        lines = [f"table {table.family} {self.name} {{", *_chains(table.leaves)]
        lines += [_declared(name, kind, table.elements.get(name, {})) for name, kind in table.sets.items()]
        return "\n".join([*lines, table.fixed, "}"]) + "\n"

    def _table_change(self, now: Table, before: Table) -> str:
        where = f"{now.family} {self.name}"
        fresh = {name: body for name, body in now.leaves.items() if name not in before.leaves}
        lines = [f"table {where} {{", *_chains(fresh), "}"] if fresh else []
        for name in now.sets:
            held, wanted = before.elements.get(name, {}), now.elements.get(name, {})
            gone = [key for key, value in held.items() if wanted.get(key) != value]
            new = [(key, value) for key, value in wanted.items() if held.get(key) != value]
            if gone:
                lines.append(f"delete element {where} {name} {{ {', '.join(gone)} }}")
            if new:
                lines.append(f"add element {where} {name} {{ {_listed(new)} }}")
        for name in before.leaves.keys() - now.leaves.keys():
            lines.append(f"flush chain {where} {name}\ndelete chain {where} {name}")
        return "".join(line + "\n" for line in lines)


def _chains(leaves: Mapping[str, tuple[str, ...]]) -> list[str]:
    return ["\n".join([f"chain {name} {{", *body, "}"]) for name, body in leaves.items()]


def _listed(elements: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{key} : {value}" if value else key for key, value in elements)


def _declared(name: str, kind: str, elements: Mapping[str, str]) -> str:
    """A set or a map with its elements; nft refuses an empty list of them."""
    word = "map" if kind.partition(";")[0].count(" : ") else "set"
    return f"{word} {name} {{ {kind};" + (f" elements = {{ {_listed(elements.items())} }};" if elements else "") + " }"


def empty_ruleset(table: str) -> str:
    """Removes what there is; no error when there is nothing."""
    return "".join(f"add table {family} {table}\ndelete table {family} {table}\n" for family in ("bridge", "inet"))


class PortFilter(NamedTuple):
    """What one port adds to the ruleset. `group` is its number in the marks."""

    port: PortDefinition
    group: int
    elements: Elements


class PortFilters:
    """Knows each port's part of the ruleset, made once per definition, and a number for each distinct tuple of rules.

    Numbers are not used again while the process lives, so that a packet marked under the old ruleset is not judged by
    the chain of another group under the new one."""

    def __init__(self) -> None:
        self._made: dict[str, PortFilter] = {}
        self._numbers: dict[tuple[SecurityRule, ...], int] = {}
        self._next = UNFILTERED + 1

    def of(self, ports: Iterable[PortDefinition]) -> list[PortFilter]:
        """The parts of these ports; what is known of others is forgotten."""
        made = {}
        for port in ports:
            known = self._made.get(port.id)
            if known is None or known.port is not port:
                group = self._number(port)
                known = PortFilter(port, group, _port_elements(port, group))
            made[port.id] = known
        self._made = made
        used = {known.port.rules for known in made.values()}
        self._numbers = {rules: number for rules, number in self._numbers.items() if rules in used}
        return list(made.values())

    def _number(self, port: PortDefinition) -> int:
        if not port.port_security:
            return UNFILTERED
        if port.rules not in self._numbers:
            used = set(self._numbers.values()) | {known.group for known in self._made.values()}
            while self._next in used or self._next > GROUPS_MAX:  # round again after 65,000 changes of rules
                self._next = self._next + 1 if self._next < GROUPS_MAX else UNFILTERED + 1
            self._numbers[port.rules] = self._next
            self._next += 1
        return self._numbers[port.rules]


class Reach(NamedTuple):
    """What a network that stands on this host is linked to: the host, and other hosts (none: no tunnel)."""

    link: Link
    vni: int = 0
    remotes: tuple[str, ...] = ()


def render_ruleset(
    names: CloudNames, filters: Iterable[PortFilter], networks: Mapping[str, Reach], *, outside: bool
) -> Ruleset:
    """The whole filter of the cloud. `networks` holds each network that stands on this host, by its id."""
    filters = list(filters)
    if not filters and not networks:
        return Ruleset(names.table, ())
    return Ruleset(
        names.table, (_bridge_table(names, filters, networks), _inet_table(names, filters, networks, outside))
    )


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


_BRIDGE_SETS = {
    "ports": "type ifname",
    "secured": "type ifname",
    "macs": "type ifname . ether_addr",
    "clients": "typeof iifname . @th,288,48",
    "own4": "type ifname . ether_addr . ipv4_addr",
    "own6": "type ifname . ether_addr . ipv6_addr",
    "pairs4": "type ifname . ether_addr . ipv4_addr; flags interval",
    "pairs6": "type ifname . ether_addr . ipv6_addr; flags interval",
    "targets6": "typeof iifname . @th,64,128",
    "pair_targets6": "typeof iifname . @th,64,128; flags interval",
    "sources": "type ifname : mark",
    "targets": "type ifname : verdict",
}
def _bridge_hooks(names: CloudNames) -> str:
    # Each host has its own gateway and DHCP server under the same addresses: neither is heard through a tunnel.
    return f"""
chain prerouting {{
type filter hook prerouting priority -200; policy accept;
meta mark set iifname map @sources
iifname @secured jump spoof
}}
chain forward {{
type filter hook forward priority -200; policy accept;
iifname "{names.tunnels}" oifname "{names.servers}" drop
iifname "{names.servers}" oifname "{names.tunnels}" drop
iifname "{names.tunnels}" udp dport {{ 67, 68 }} drop
oifname "{names.tunnels}" udp dport {{ 67, 68 }} drop
oifname vmap @targets
}}
chain input {{
type filter hook input priority -200; policy accept;
iifname @ports drop
}}
"""


def _interface_elements(interface: str, group: int) -> Elements:
    key = f'"{interface}"'
    sources, targets = f"{group << SOURCE_SHIFT:#x}", f"jump to_{group}"
    return {"ports": {key: ""}, "sources": {key: sources}, "targets": {key: targets}}


def _port_elements(port: PortDefinition, group: int) -> Elements:
    """A port in the sets of the bridge table."""
    made = _interface_elements(port.tap_name, group)
    if not port.port_security:
        return made
    tap, mac = f'"{port.tap_name}"', port.mac_address.lower()
    pairs = [(ipaddress.ip_network(cidr, strict=False), pair_mac.lower()) for cidr, pair_mac in port.allowed_pairs]
    made["secured"] = {tap: ""}
    macs = dict.fromkeys([mac, *(pair_mac for _, pair_mac in pairs)])
    made["macs"] = {f"{tap} . {each}": "" for each in macs}
    made["clients"] = {f"{tap} . 0x{each.replace(':', '')}": "" for each in macs}
    addresses = [ipaddress.ip_address(fixed.ip_address) for fixed in port.fixed_ips]
    six = [address for address in (*addresses, link_local(mac)) if address.version == 6]
    made["own4"] = {f"{tap} . {mac} . {address}": "" for address in addresses if address.version == 4}
    made["own6"] = {f"{tap} . {mac} . {address}": "" for address in six}
    made["targets6"] = {f"{tap} . {int(address):#034x}": "" for address in six}
    for each in macs:
        for cidr in collapse(network for network, owner in pairs if owner == each):
            made.setdefault(f"pairs{cidr.version}", {})[f"{tap} . {each} . {cidr}"] = ""
    for cidr in collapse(network for network, _ in pairs if network.version == 6):
        first, last = int(cidr.network_address), int(cidr.broadcast_address)
        made.setdefault("pair_targets6", {})[f"{tap} . {first:#034x}-{last:#034x}"] = ""
    return made


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


def _bridge_table(names: CloudNames, filters: list[PortFilter], networks: Mapping[str, Reach]) -> Table:
    # Hook input: guests have no business with the host itself, by whatever protocol; a bridge is no address of the host.
    elements: Elements = {name: {} for name in _BRIDGE_SETS}
    # What comes through a tunnel passed the spoofing filter of the host that it comes from.
    others = [names.server(network_id) for network_id in sorted(networks)]
    others += [names.tunnel(network_id) for network_id, reach in sorted(networks.items()) if reach.remotes]
    for part in (*(known.elements for known in filters), *(_interface_elements(name, UNFILTERED) for name in others)):
        for name, held in part.items():
            elements[name].update(held)
    groups = dict.fromkeys([UNFILTERED, *(known.group for known in filters)])
    leaves = {f"to_{group}": (f"meta mark set meta mark or {group:#x}",) for group in groups}
    return Table("bridge", _BRIDGE_SETS, elements, leaves, _SPOOF_CHAINS + _bridge_hooks(names))


# --- family inet: security groups, the host, the outside ------------------------------------------------------------


_INET_SETS = {
    "egress": "type mark : verdict",
    "ingress": "type mark : verdict",
    "zones": "typeof iifname : ct zone",
    "links": "type ipv4_addr",
    # Bits 96 to 119 after the UDP header's start are the tunnel's number (RFC 7348).
    "vnis": "typeof @th,96,24",
    "remotes": "typeof @th,96,24 . ip saddr",
}
# A conntrack zone for each network: two networks may use the same addresses.
_ZONE_CHAIN = "chain zone {\ntype filter hook prerouting priority -300; policy accept;\nct zone set iifname map @zones\n}"


def _inet_table(names: CloudNames, filters: list[PortFilter], networks: Mapping[str, Reach], outside: bool) -> Table:
    rules = {known.group: known.port.rules for known in filters if known.port.port_security}
    elements: Elements = {
        "egress": {f"{group << SOURCE_SHIFT:#x}": f"jump egress_{group}" for group in rules},
        "ingress": {f"{group:#x}": f"jump ingress_{group}" for group in rules},
        "zones": {f'"{names.bridge(network_id)}"': str(each.link.zone) for network_id, each in networks.items()},
        "links": {str(each.link.inner_address): "" for each in networks.values()},
        "vnis": {f"{each.vni:#08x}": "" for each in networks.values() if each.remotes},
        "remotes": {f"{each.vni:#08x} . {remote}": "" for each in networks.values() for remote in each.remotes},
    }
    leaves = {
        f"{direction}_{group}": tuple(chain_lines(wanted, direction))
        for group, wanted in rules.items()
        for direction in ("egress", "ingress")
    }
    fixed = [_ZONE_CHAIN, *_bridged_chain(), *_host_chains(names, outside=outside)]
    return Table("inet", _INET_SETS, elements, leaves, "\n".join(fixed))


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
        f"udp dport {VXLAN_PORT} drop",  # other hosts would take it for ours, since it bears our address
        "accept" if outside else "drop",
        "}",
        "chain to_guests {\nct state established,related accept\ndrop\n}",
        "chain to_host {\nct state established,related accept\nicmp type echo-request accept\ndrop\n}",
        # Others on this host may have tunnels too; only our numbers are our business.
        "chain tunnelled {\n@th,96,24 != @vnis return\n@th,96,24 . ip saddr @remotes return\ndrop\n}",
        "chain input {\ntype filter hook input priority -10; policy accept;",
        f"udp dport {VXLAN_PORT} jump tunnelled",
        f'iifname "{names.bridges}" drop\niifname "{names.uplinks}" goto to_host\n}}',
        "chain forward {\ntype filter hook forward priority -10; policy accept;",
        f'iifname "{names.bridges}" oifname "{names.bridges}" goto bridged',
        f'iifname "{names.bridges}" drop\noifname "{names.bridges}" drop',
        f'iifname "{names.uplinks}" goto from_guests\noifname "{names.uplinks}" goto to_guests\n}}',
        "chain source_nat {\ntype nat hook postrouting priority 100; policy accept;",
        f'ip saddr @links oifname != "{ANY_UPLINK}" masquerade\n}}',
    ]
