"""Networks and ports as a host sees them: everything that is needed to plug a guest, and nothing else."""

from __future__ import annotations

import msgspec

TAP_NAME_LENGTH = 14  # IFNAMSIZ less the terminator, as the field's own agents cut it


class SubnetDefinition(msgspec.Struct, frozen=True):
    """`cidr` as text, `gateway_ip` None where there is no router, `host_routes` as (destination CIDR, next hop)."""

    id: str
    cidr: str
    gateway_ip: str | None
    dhcp_enabled: bool = True
    dns_nameservers: tuple[str, ...] = ()
    host_routes: tuple[tuple[str, str], ...] = ()
    dhcp_ip: str | None = None  # the address of the DHCP server when there is no gateway address of ours


class NetworkDefinition(msgspec.Struct, frozen=True):
    """A network as it must exist on a host. `nat`: its guests reach the outside, and the host reaches them.

    `remotes`: the IPv4 addresses of the other hosts that have ports of it; to them it reaches over a tunnel with the number
    `vni` (1 to 2^24-1). `reach` grows when they change: of two definitions the host takes the remotes of the higher one."""

    id: str
    mtu: int
    subnets: tuple[SubnetDefinition, ...]
    nat: bool = True
    vni: int = 0
    remotes: tuple[str, ...] = ()
    reach: int = 0


class SecurityRule(msgspec.Struct, frozen=True):
    """What is let through. `direction` ingress|egress, `ethertype` IPv4|IPv6, None means any. Ports are inclusive; for
    icmp they are type and code. `remote_cidrs` empty means anybody (members of a remote group come resolved)."""

    direction: str
    ethertype: str
    protocol: str | None = None
    port_min: int | None = None
    port_max: int | None = None
    remote_cidrs: tuple[str, ...] = ()
    remote_nobody: bool = False  # the remote group has no member: the rule lets nobody through


class FixedIp(msgspec.Struct, frozen=True):
    subnet_id: str
    ip_address: str
    prefix_length: int


class PortDefinition(msgspec.Struct, frozen=True):
    """A port as it must be plugged on a host. `port_security` False: no spoofing filter and no security groups.

    `arriving`: its guest still runs on another host and comes here by live migration; until then the other hosts must
    not be told that it is here."""

    id: str
    network: NetworkDefinition
    mac_address: str
    fixed_ips: tuple[FixedIp, ...]
    hostname: str = ""
    port_security: bool = True
    rules: tuple[SecurityRule, ...] = ()
    allowed_pairs: tuple[tuple[str, str], ...] = ()  # (CIDR, MAC) that the guest may use besides its own
    arriving: bool = False

    @property
    def tap_name(self) -> str:
        return ("tap" + self.id)[:TAP_NAME_LENGTH]


class RequestedNetwork(msgspec.Struct, frozen=True):
    """One NIC as a user asked for it: a network (a port is made in it), or a port that exists."""

    network_id: str | None = None
    port_id: str | None = None
    fixed_ip: str | None = None
    tag: str | None = None


class InstancePort(msgspec.Struct, frozen=True):
    """A port of an instance: what the server view shows, and what its host plugs."""

    definition: PortDefinition
    network_name: str
    made_by_us: bool  # deleted with the instance; a port that the user brought is only unbound
    tag: str | None = None
