"""How the things of one cloud are called on a host, and the only values that may enter a command or a rule.

Every name carries the cloud's tag, so that clouds live side by side and each removes only its own. Used by all of
`linux_network`; `validate_ports` is its gate: what passed it is safe to write into nft, ip and dnsmasq text."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from pathlib import Path

from instar.errors import HypervisorError
from instar.model.network import FixedIp, NetworkDefinition, PortDefinition, SecurityRule

TAG_LENGTH = 6
# Prefixes of the host's interfaces; the kernel allows 15 characters: prefix, tag, six characters of the network.
BRIDGE, SERVER, UPLINK, TUNNEL = "isb", "isv", "isu", "isx"
ANY_UPLINK, ANY_BRIDGE = UPLINK + "*", BRIDGE + "*"  # of all clouds on the host
RUN_DIR = Path("/run/instar-net")
NETNS_DIR = Path("/run/netns")
RULES_MAX, CIDRS_MAX, MTU_MIN, MTU_MAX = 2000, 10_000, 576, 65_535
VNI_MAX, REMOTES_MAX = (1 << 24) - 1, 4096

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
# dnsmasq reads these as a lease time or a command when they stand where a host's name may stand.
_DNSMASQ_WORD = re.compile(r"\d+[smhdw]?|infinite|ignore|deprecated")

PROTOCOLS = {
    "icmp": 1, "igmp": 2, "ipip": 4, "tcp": 6, "egp": 8, "udp": 17, "dccp": 33, "ipv6-encap": 41, "ipv6-route": 43,
    "ipv6-frag": 44, "rsvp": 46, "gre": 47, "esp": 50, "ah": 51, "icmpv6": 58, "ipv6-icmp": 58, "ipv6-nonxt": 59,
    "ipv6-opts": 60, "ospf": 89, "pgm": 113, "vrrp": 112, "sctp": 132, "udplite": 136,
}  # fmt: skip


class CloudNames:
    """The names of one cloud. `cloud_id`: 4 to 32 lower-case hexadecimal digits, unique among the host's clouds."""

    def __init__(self, cloud_id: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{4,32}", cloud_id):
            raise ValueError("cloud_id must be 4 to 32 lower-case hexadecimal digits")
        exact = len(cloud_id) == TAG_LENGTH
        self.tag = cloud_id if exact else hashlib.sha256(cloud_id.encode()).hexdigest()[:TAG_LENGTH]
        self.table = f"instar_{self.tag}"
        self.run_dir = RUN_DIR / self.tag
        self.bridges, self.servers, self.uplinks, self.tunnels = (
            f"{kind}{self.tag}*" for kind in (BRIDGE, SERVER, UPLINK, TUNNEL)
        )

    def bridge(self, network_id: str) -> str:
        return self._interface(BRIDGE, network_id)

    def server(self, network_id: str) -> str:
        """The host's end of the veth between the bridge and the namespace."""
        return self._interface(SERVER, network_id)

    def uplink(self, network_id: str) -> str:
        """The host's end of the veth between the host's own network and the namespace."""
        return self._interface(UPLINK, network_id)

    def tunnel(self, network_id: str) -> str:
        """The VXLAN device in the bridge, by which the network reaches the other hosts."""
        return self._interface(TUNNEL, network_id)

    def namespace(self, network_id: str) -> str:
        return f"instar-{self.tag}-{network_id}"

    def network_of_namespace(self, namespace: str) -> str | None:
        """The network id in a namespace's name, None when the namespace is not of this cloud."""
        prefix = f"instar-{self.tag}-"
        network_id = namespace.removeprefix(prefix)
        return network_id if namespace.startswith(prefix) and _UUID.fullmatch(network_id) else None

    def owns_interface(self, interface: str) -> bool:
        return any(interface.startswith(kind + self.tag) for kind in (BRIDGE, SERVER, UPLINK, TUNNEL))

    def link_seed(self, network_id: str) -> int:
        """Where to begin looking for free link addresses: the same for the same network each time."""
        return int.from_bytes(self._digest(network_id)[8:12], "big")

    def _digest(self, network_id: str) -> bytes:
        return hashlib.sha256(f"{self.tag}:{network_id}".encode()).digest()

    def _interface(self, kind: str, network_id: str) -> str:
        number = int.from_bytes(self._digest(network_id)[:8], "big")
        letters = ""
        for _ in range(15 - len(kind) - TAG_LENGTH):
            number, digit = divmod(number, len(_ALPHABET))
            letters += _ALPHABET[digit]
        return kind + self.tag + letters


def gateway_mac(network_id: str) -> str:
    """The MAC of a network's gateway: the same on each host, so that a guest that moves needs not ask for it again."""
    digits = hashlib.sha256(f"gateway:{network_id}".encode()).hexdigest()[:8]
    return "02:1b:" + ":".join(digits[i : i + 2] for i in range(0, 8, 2))


def dhcp_hostname(name: str) -> str:
    """`name` cut down to [a-z0-9-], at most 63; empty when nothing is left that a DHCP server may hand out."""
    label = re.sub(r"[^a-z0-9-]", "", name.lower().split(".")[0])[:63].strip("-")
    return "" if _DNSMASQ_WORD.fullmatch(label) else label


def protocol_number(protocol: str) -> int | None:
    """The IP protocol number of a name or a number in text; None when it is neither."""
    if protocol.isascii() and protocol.isdigit() and len(protocol) <= 3 and int(protocol) <= 255:
        return int(protocol)
    return PROTOCOLS.get(protocol.lower())


def validate_id(kind: str, value: str) -> None:
    if not _UUID.fullmatch(value):
        raise HypervisorError(reason=f"the id of the {kind} is not a UUID")


def validate_ports(instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
    """Refuse anything that is not what it should be, before it comes near a rule. Raises HypervisorError."""
    validate_id("instance", instance_id)
    if len({port.tap_name for port in ports}) != len(ports):
        raise HypervisorError(reason="two ports of the instance have the same id")
    for port in ports:
        validate_id("port", port.id)
        _validate_network(port.network)
        try:
            _validate_addresses(port)
        except ValueError:
            raise HypervisorError(reason=f"port {port.id} has a malformed address") from None
        if len(port.rules) > RULES_MAX:
            raise HypervisorError(reason=f"port {port.id} has more than {RULES_MAX} security group rules")
        for rule in port.rules:
            _validate_rule(rule)


def _validate_addresses(port: PortDefinition) -> None:
    for mac in (port.mac_address, *(mac for _, mac in port.allowed_pairs)):
        if not _MAC.fullmatch(mac.lower()):
            raise ValueError(mac)
    for fixed in port.fixed_ips:
        _validate_fixed_ip(fixed)
    for cidr, _ in port.allowed_pairs:
        ipaddress.ip_network(cidr, strict=False)


def _validate_fixed_ip(fixed: FixedIp) -> None:
    if ipaddress.ip_address(fixed.ip_address).version == 6 and "%" in fixed.ip_address:
        raise ValueError(fixed.ip_address)


def _validate_network(network: NetworkDefinition) -> None:
    validate_id("network", network.id)
    if not MTU_MIN <= network.mtu <= MTU_MAX:
        raise HypervisorError(reason=f"the MTU {network.mtu} of network {network.id} is out of range")
    if not 0 <= network.vni <= VNI_MAX or len(network.remotes) > REMOTES_MAX:
        raise HypervisorError(reason=f"network {network.id} has an impossible tunnel")
    try:
        for remote in network.remotes:
            ipaddress.IPv4Address(remote)
        for subnet in network.subnets:
            cidr = ipaddress.ip_network(subnet.cidr)
            hosts = [hop for _, hop in subnet.host_routes] + list(subnet.dns_nameservers)
            for address in (subnet.gateway_ip, subnet.dhcp_ip, *hosts):
                if address is not None:
                    ipaddress.ip_address(address)
            for destination, _ in subnet.host_routes:
                ipaddress.ip_network(destination)
            for address in (subnet.gateway_ip, subnet.dhcp_ip):
                if address is not None and ipaddress.ip_address(address).version != cidr.version:
                    raise ValueError(address)
    except ValueError:
        raise HypervisorError(reason=f"network {network.id} has a malformed subnet or remote host") from None


def _validate_rule(rule: SecurityRule) -> None:
    if rule.direction not in ("ingress", "egress") or rule.ethertype not in ("IPv4", "IPv6"):
        raise HypervisorError(reason="a security group rule has an unknown direction or ethertype")
    if rule.protocol is not None and protocol_number(rule.protocol) is None:
        raise HypervisorError(reason="a security group rule has an unknown protocol")
    for number in (rule.port_min, rule.port_max):
        if number is not None and not 0 <= number <= 65535:
            raise HypervisorError(reason="a security group rule has a port out of range")
    if len(rule.remote_cidrs) > CIDRS_MAX:
        raise HypervisorError(reason=f"a security group rule has more than {CIDRS_MAX} remote addresses")
    version = 4 if rule.ethertype == "IPv4" else 6
    try:
        if any(ipaddress.ip_network(cidr, strict=False).version != version for cidr in rule.remote_cidrs):
            raise ValueError
    except ValueError:
        raise HypervisorError(reason="a security group rule has a malformed remote address") from None
