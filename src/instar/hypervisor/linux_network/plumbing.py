"""The interfaces and the namespace of one network: looks what is there, and makes what is missing.

Namespace `instar-TAG-NETWORK`: `int` is plugged into the bridge with the addresses of gateway and DHCP server, `out` leads
to the host when the network has NAT. Called by `LinuxNetwork`, never twice at once for one network."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from pathlib import Path
from typing import NamedTuple

import structlog

from instar.errors import HypervisorError
from instar.hypervisor.linux_network import netlink
from instar.hypervisor.linux_network.dhcp import INNER_INTERFACE, gateway_is_ours, server_address
from instar.hypervisor.linux_network.filter_generation import filter_generation
from instar.hypervisor.linux_network.host_commands import ip_batch, nft_load, run, run_both
from instar.hypervisor.linux_network.links import HostRoute, Link, has_default_route, host_routes, overlapping
from instar.hypervisor.linux_network.names import NETNS_DIR, CloudNames, gateway_mac
from instar.model.network import NetworkDefinition

log = structlog.get_logger(__name__)

OUTER_INTERFACE = "out"
PLUG_ATTEMPTS = 5
PLUG_PAUSE_S = 0.05  # a tap that leaves is gone in less
SYS_NET = Path("/sys/class/net")
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_NAMESPACE_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.disable_ipv6=1",  # we serve no IPv6: no address that a guest could talk to
    "net.ipv6.conf.default.disable_ipv6=1",
    "net.ipv4.conf.all.send_redirects=0",
    "net.ipv4.conf.default.send_redirects=0",
    "net.ipv4.conf.all.arp_notify=1",  # guests of an earlier version knew the gateway by another MAC
)
# Guests may ask the gateway for an address and ping it, no more. What they send out bears the link's address.
_NAMESPACE_RULES = f"""add table ip instar
delete table ip instar
table ip instar {{
chain input {{
type filter hook input priority 0; policy drop;
iifname "lo" accept
ct state established,related accept
icmp type echo-request accept
iifname "{INNER_INTERFACE}" udp sport 68 udp dport 67 accept
}}
chain forward {{
type filter hook forward priority 0; policy drop;
ct state invalid drop
iifname {{ "{INNER_INTERFACE}", "{OUTER_INTERFACE}" }} accept
}}
chain source_nat {{
type nat hook postrouting priority 100; policy accept;
oifname "{OUTER_INTERFACE}" masquerade
}}
}}
"""


class Standing(NamedTuple):
    """What the kernel's files say is there of a network."""

    bridge: bool
    namespace: bool
    server: bool
    uplink: bool
    well: bool  # all of it there, up, plugged, with the right MTU
    strays: tuple[str, ...]  # taps of the network that are not plugged into its bridge


class Inside(NamedTuple):
    """What the kernel tells of a network's namespace: (interface, address/prefix or the gateway's MAC), and the number of
    its packet filter."""

    addresses: set[tuple[str, str]]
    generation: int | None


# Namespace → (its identity, the number of its packet filter when that was ours and nobody else's).
InnerFilters = dict[str, tuple[int, int]]


class Plumbing:
    """One network of one cloud on this host. `filters` remembers from one to the next what their namespaces filter."""

    def __init__(
        self, names: CloudNames, network_id: str, *, outside: bool, filters: InnerFilters | None = None
    ) -> None:
        self._names, self._network_id, self._outside = names, network_id, outside
        self._filters = {} if filters is None else filters
        self._bridge, self._server = names.bridge(network_id), names.server(network_id)
        self._uplink, self._namespace = names.uplink(network_id), names.namespace(network_id)
        self._tunnel = names.tunnel(network_id)

    async def ensure(self, network: NetworkDefinition, link: Link, taps: tuple[str, ...], *, thorough: bool) -> bool:
        """All of the network is there, and its existing taps are plugged. True when `int` is new. Without
        `thorough` only the host's side is looked at, which costs no process."""
        standing = await asyncio.to_thread(self._look, network, taps)
        addresses = self._addresses(network, link)
        well, routes = standing.well, list[HostRoute]()
        if well and thorough:
            found, routes = await asyncio.gather(self._look_inside(), host_routes())
            well = found.addresses == addresses
            if well and self._filters.get(self._namespace) != (self._identity(), found.generation):
                await self._load_filter(found.generation)
        if not well:
            await self._build(network, link, standing, addresses)
        if standing.strays and standing.bridge:
            await asyncio.sleep(PLUG_PAUSE_S)  # libvirt may have made the tap just now: it plugs it itself
        if standing.strays or not standing.bridge:
            await self._plug(network, taps)
        if network.nat and (thorough or not well):
            await self._ensure_routes(network, link, routes if well else await host_routes())
        return not (standing.namespace and standing.server)

    async def remove(self, *, taps: tuple[str, ...] = ()) -> None:
        """Nothing of the network is left on this host."""
        links = [self._tunnel, self._server, self._uplink, self._bridge, *taps]
        lines = [f"link del dev {name}" for name in links if (SYS_NET / name).exists()]
        if (NETNS_DIR / self._namespace).exists():
            lines.append(f"netns del {self._namespace}")
        self._filters.pop(self._namespace, None)
        await ip_batch(lines, force=True)
        if any((SYS_NET / name).exists() for name in links) or (NETNS_DIR / self._namespace).exists():
            raise HypervisorError(reason=f"network {self._network_id} cannot be removed from the host")

    # --- looking ---

    def _look(self, network: NetworkDefinition, taps: tuple[str, ...]) -> Standing:
        bridge, server, uplink = (_exists(name) for name in (self._bridge, self._server, self._uplink))
        namespace = _is_namespace(NETNS_DIR / self._namespace)
        plugged = server and master_of(self._server) == self._bridge
        names = [self._bridge, self._server, *([self._uplink] if network.nat else [])]
        well = bridge and namespace and plugged and uplink == network.nat
        well = well and all(is_up(name) and attribute(name, "mtu") == str(network.mtu) for name in names)
        well = well and all(attribute(self._bridge, f"bridge/nf_call_{kind}") == "1" for kind in ("iptables", "ip6tables"))
        strays = tuple(tap for tap in taps if _exists(tap) and master_of(tap) != self._bridge)
        return Standing(bridge, namespace, server, uplink, well, strays)

    def _addresses(self, network: NetworkDefinition, link: Link) -> set[tuple[str, str]]:
        """(interface, address/prefix) in the namespace, as they should be, and the gateway's MAC."""
        wanted = {(INNER_INTERFACE, gateway_mac(self._network_id))}
        for subnet in network.subnets:
            cidr = ipaddress.ip_network(subnet.cidr)
            if cidr.version == 4:
                gateway = subnet.gateway_ip if gateway_is_ours(network, subnet) else None
                for address in {gateway, server_address(network, subnet)} - {None}:
                    wanted.add((INNER_INTERFACE, f"{address}/{cidr.prefixlen}"))
        if network.nat:
            wanted.add((OUTER_INTERFACE, f"{link.inner_address}/30"))
        return wanted

    async def _look_inside(self) -> Inside:
        try:
            interfaces, generation = await asyncio.to_thread(
                netlink.inside, NETNS_DIR / self._namespace, lambda: (netlink.interfaces(), filter_generation())
            )
        except OSError as error:
            log.warning("network.namespace_unreadable", network_id=self._network_id, error=str(error))
            return Inside(set(), None)
        standing = [one for one in interfaces if one.is_up and one.name != "lo"]
        found = {(one.name, one.mac) for one in standing if one.name == INNER_INTERFACE}
        return Inside(found | {(one.name, address) for one in standing for address in one.addresses}, generation)

    async def _load_filter(self, before: int | None) -> None:
        """The namespace's packet filter is ours; `before` was its number. It is known to stay so for as long as the number
        is the same, when ours was the only change since."""
        await nft_load(_NAMESPACE_RULES, namespace=self._namespace)
        after = (await self._look_inside()).generation
        if before is not None and after == before + 1:
            self._filters[self._namespace] = (self._identity(), after)

    def _identity(self) -> int:
        """Of the namespace, as long as it lives; 0 where there is none."""
        try:
            return (NETNS_DIR / self._namespace).stat().st_ino
        except OSError:
            return 0

    # --- making ---

    async def _build(
        self, network: NetworkDefinition, link: Link, standing: Standing, addresses: set[tuple[str, str]]
    ) -> None:
        """Bring what stands to what should be. Commands that find things as they should be change nothing."""
        log.info("network.build", network_id=self._network_id, bridge=self._bridge, repaired=standing.bridge)
        lines = []
        if not standing.namespace:
            # A name without a namespace is what a crash of the host's tools leaves; its veths died with it.
            stale = (NETNS_DIR / self._namespace).exists()
            lines += [f"netns del {self._namespace}"] if stale else []
            lines.append(f"netns add {self._namespace}")
        if not standing.bridge:
            filtered = "nf_call_iptables 1 nf_call_ip6tables 1 nf_call_arptables 0"
            address = self._bridge_mac()
            lines.append(
                f"link add {self._bridge} address {address} type bridge forward_delay 0 mcast_snooping 0 {filtered}"
            )
        else:
            lines.append(f"link set {self._bridge} type bridge nf_call_iptables 1 nf_call_ip6tables 1")
        for name, inner, there, wanted in (
            (self._server, INNER_INTERFACE, standing.server, True),
            (self._uplink, OUTER_INTERFACE, standing.uplink, network.nat),
        ):
            if there and not (standing.namespace and wanted):
                lines.append(f"link del dev {name}")
                there = False
            if wanted and not there:
                lines.append(f"link add {name} type veth peer name {inner} netns {self._namespace}")
        await ip_batch(lines)
        await asyncio.to_thread(self._disable_ipv6)
        await run_both(self._configure_inside(network, link, addresses), self._configure_host(network, link))

    async def _configure_inside(self, network: NetworkDefinition, link: Link, addresses: set[tuple[str, str]]) -> None:
        await run("ip", "netns", "exec", self._namespace, "sysctl", "-e", "-q", "-w", *_NAMESPACE_SYSCTLS)
        found, generation = await self._look_inside()
        await self._load_filter(generation)
        inner = [INNER_INTERFACE, *([OUTER_INTERFACE] if network.nat else [])]
        lines = ["link set lo up", f"link set {INNER_INTERFACE} address {gateway_mac(self._network_id)}"]
        lines += [f"link set {name} mtu {network.mtu} up" for name in inner]
        lines += [f"addr del {address} dev {name}" for name, address in sorted(found - addresses) if "/" in address]
        lines += [f"addr replace {address} dev {name}" for name, address in sorted(addresses) if "/" in address]
        lines += [f"route replace default via {link.host_address} dev {OUTER_INTERFACE}"] if network.nat else []
        await ip_batch(lines, namespace=self._namespace)

    async def _configure_host(self, network: NetworkDefinition, link: Link) -> None:
        lines = [
            f"link set {self._bridge} mtu {network.mtu} up",
            f"link set {self._bridge} alias {self._network_id}",
            f"link set {self._server} mtu {network.mtu} master {self._bridge} up",
        ]
        if network.nat:
            lines.append(f"addr replace {link.host_address}/30 dev {self._uplink}")
            lines.append(f"link set {self._uplink} mtu {network.mtu} up")
        await ip_batch(lines)

    def _disable_ipv6(self) -> None:
        """No link-local address on the host's side by which a guest could reach it."""
        for name in (self._bridge, self._server, self._uplink):
            with contextlib.suppress(OSError):  # a kernel without IPv6, a network without uplink
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")

    def _bridge_mac(self) -> str:
        """A fixed address: a bridge without one changes it as taps come and go."""
        digits = f"{self._names.link_seed(self._network_id):08x}"
        return "02:1a:" + ":".join(digits[i : i + 2] for i in range(0, 8, 2))

    async def _plug(self, network: NetworkDefinition, taps: tuple[str, ...]) -> None:
        """Put running guests' taps back into a bridge that had to be made again."""
        for attempt in range(PLUG_ATTEMPTS):
            strays = (await asyncio.to_thread(self._look, network, taps)).strays
            try:
                await ip_batch([f"link set {tap} master {self._bridge} up" for tap in strays])
                return
            except HypervisorError:
                # The tap of a guest that ends leaves the bridge first and the host a moment later: it needs no place.
                if attempt == PLUG_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(PLUG_PAUSE_S)

    async def _ensure_routes(self, network: NetworkDefinition, link: Link, routes: list[HostRoute]) -> None:
        """The host reaches the subnets, unless a route of its own is in the way. `routes` are all that it has."""
        subnets = [ipaddress.ip_network(subnet.cidr) for subnet in network.subnets]
        wanted = [subnet for subnet in subnets if isinstance(subnet, ipaddress.IPv4Network)]
        lines = []
        for subnet in wanted:
            if HostRoute(subnet, self._uplink) in routes:
                continue
            clash = overlapping(subnet, routes, but_for=self._uplink)
            if clash is None:
                lines.append(f"route replace {subnet} via {link.inner_address} dev {self._uplink}")
            else:
                log.warning("network.no_host_route", network_id=self._network_id, subnet=str(subnet), clash=clash.device)
        stale = [r for r in routes if r.device == self._uplink and r.destination not in (*wanted, link.network)]
        lines += [f"route del {r.destination} dev {r.device}" for r in stale if not r.destination.overlaps(link.network)]
        await ip_batch(lines)
        if self._outside and await asyncio.to_thread(IP_FORWARD.read_text) == "0\n" and await has_default_route():
            log.warning("network.ip_forward_enabled", why="guests reach the outside through this host")
            await asyncio.to_thread(IP_FORWARD.write_text, "1\n")


def master_of(interface: str) -> str:
    """The bridge an interface is plugged into; empty when there is none."""
    try:
        return (SYS_NET / interface / "master").readlink().name
    except OSError:
        return ""


def _exists(interface: str) -> bool:
    return (SYS_NET / interface).exists()


def attribute(interface: str, name: str) -> str:
    """What the kernel says of an interface; empty when it is not there."""
    try:
        return (SYS_NET / interface / name).read_text().strip()
    except OSError:
        return ""


def is_up(interface: str) -> bool:
    """False also when it is not there."""
    flags = attribute(interface, "flags")
    return flags != "" and int(flags, 16) & 1 == 1


def _is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted at its name; else it is an empty file on the file system of /run."""
    try:
        return path.stat().st_dev != NETNS_DIR.parent.stat().st_dev
    except OSError:
        return False
