"""LinuxNetwork: the networks of one cloud on one Linux host. Made by the libvirt driver, which calls nothing else here.

What should be is in memory and in `records`; each call brings the host to it. One lock for each network, one for the
packet filter; calls that wait for the filter share one load."""

from __future__ import annotations

import asyncio
import shutil
from collections import defaultdict
from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import structlog

from instar.errors import HypervisorError, InstarError
from instar.hypervisor.linux_network.dhcp import DhcpServer, remove_directory, stop_processes
from instar.hypervisor.linux_network.filter_generation import filter_generation
from instar.hypervisor.linux_network.host_commands import ip_batch, nft_load, run, run_both
from instar.hypervisor.linux_network.links import Link, choose_link, host_routes, turn_to_choose
from instar.hypervisor.linux_network.names import NETNS_DIR, CloudNames, validate_id, validate_ports
from instar.hypervisor.linux_network.plumbing import SYS_NET, InnerFilters, Plumbing, master_of
from instar.hypervisor.linux_network.records import NetworkRecord, Records
from instar.hypervisor.linux_network.ruleset import PortFilters, Reach, Ruleset, empty_ruleset, render_ruleset
from instar.hypervisor.linux_network.tunnel import OVERHEAD, Tunnel, remotes_of, underlay_mtu
from instar.model.network import NetworkDefinition, PortDefinition

log = structlog.get_logger(__name__)

PROGRAMS = ("ip", "bridge", "nft", "dnsmasq", "sysctl")
BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
REPAIRS_AT_ONCE = 4
DHCP_LATER_S = 1.0


class LinuxNetwork:
    """Implements HostNetwork. `state_dir` is this cloud's own; `cloud_id` is 4 to 32 hexadecimal digits, unique on the
    host; `outside` False keeps guests from leaving the host even where a network has NAT. `underlay_address` is the IPv4
    address by which other hosts reach this one; without it networks end at this host."""

    def __init__(
        self, *, state_dir: Path, cloud_id: str, outside: bool = True, underlay_address: str | None = None
    ) -> None:
        self._names = CloudNames(cloud_id)
        self._records = Records(state_dir)
        self._outside = outside
        self._underlay = None if underlay_address is None else str(IPv4Address(underlay_address))
        self._underlay_mtu = 0
        self._tunnels: dict[str, tuple[int, tuple[str, ...]]] = {}  # as this process last made them
        self._instances: dict[str, tuple[PortDefinition, ...]] = {}
        self._networks: dict[str, NetworkRecord] = {}
        self._network_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._filter_lock = asyncio.Lock()
        self._filter_wanted = self._filter_loaded = 0
        self._filters = PortFilters()
        self._in_kernel: Ruleset | None = None
        self._inner_filters: InnerFilters = {}
        self._left: dict[str, asyncio.Task[None]] = {}  # networks whose DHCP server still knows ports that went
        self._tidying: set[asyncio.Task[None]] = set()
        self._generation: int | None = None  # of the kernel's filter, when it is known to be `_in_kernel`

    async def open(self) -> None:
        """Check what the host can do, then adopt and repair what an earlier process left. Raises HypervisorError when a
        program or the kernel's bridge filter is missing; one network that cannot be repaired is only logged."""
        for program in PROGRAMS:
            if shutil.which(program) is None:
                raise HypervisorError(reason=f"the program {program} is not installed on the host")
        await _ensure_bridge_filter()
        if self._underlay is not None:
            self._underlay_mtu = await underlay_mtu(self._underlay)
        await asyncio.to_thread(self._records.prepare)
        self._instances, self._networks = await asyncio.to_thread(self._records.load)
        known = set(self._networks) | {port.network.id for port in self._all_ports()}
        await self._load_filter()  # before the rest: running guests must not be without it
        repairs = asyncio.Semaphore(REPAIRS_AT_ONCE)

        async def repair(network_id: str) -> None:
            async with repairs:
                try:
                    await self._settle(network_id, thorough=True)
                    await self._settle_tunnel(network_id, thorough=True)
                except InstarError as error:
                    log.error("network.repair_failed", network_id=network_id, error=error.message)

        await asyncio.gather(*(repair(network_id) for network_id in sorted(known)))
        await self._load_filter()

    async def close(self) -> None:
        """Networks, DHCP servers and filters stay. What a DHCP server has yet to forget it is told by the next `open`."""
        left = list(self._left.values())
        for waiting in left:
            waiting.cancel()
        await asyncio.gather(*left, *self._tidying, return_exceptions=True)

    async def ensure_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        """`ports` are all ports of the instance on this host; one that it had and that is not among them goes.
        Raises HypervisorError."""
        validate_ports(instance_id, ports)
        before = self._instances.get(instance_id, ())
        again = before == ports  # asked for what was done already: look closer, somebody may have damaged it
        await asyncio.to_thread(self._records.save_instance, instance_id, ports)
        self._instances[instance_id] = ports
        definitions = {port.network.id: port.network for port in ports}
        left = {port.network.id for port in before}
        settle = self._settle_all(definitions, left, thorough=again)
        records = [self._networks.get(network_id) for network_id in definitions]
        if again or self._stand_unchanged(definitions, left):  # nothing new that the filter would have to wait for
            await run_both(settle, self._load_filter())
            same = records == [self._networks.get(network_id) for network_id in definitions]
        else:
            await settle
            same = False
        if not same:  # also where a network went and came again meanwhile, with the last port of another instance
            await self._load_filter()  # before the tunnels: nobody may send through them who must not
        announced = () if again else tuple((port.id, port.mac_address) for port in before if not port.arriving)
        here = [port for port in ports if not port.arriving and (port.id, port.mac_address) not in announced]
        for network_id in sorted(definitions):
            macs = [port.mac_address.lower() for port in here if port.network.id == network_id]
            await self._settle_tunnel(network_id, thorough=again, announce=macs)

    async def ensure_no_ports(self, instance_id: str) -> None:
        """The instance's guest must not run any more: taps that it left are deleted. Raises HypervisorError."""
        validate_id("instance", instance_id)
        ports = self._instances.get(instance_id, ())
        if ports:
            there = [port.tap_name for port in ports if (SYS_NET / port.tap_name).exists()]
            await ip_batch([f"link del dev {tap}" for tap in there], force=True)
            self._instances.pop(instance_id, None)  # another such call may have been quicker
            try:
                left = {port.network.id for port in ports}
                if all(self._ports_of(network_id) for network_id in left):
                    await run_both(self._settle_all({}, left), self._load_filter())
                else:  # a network goes, and is not forgotten before it is gone
                    await self._settle_all({}, left)
                    await self._load_filter()
            except BaseException:
                # Not yet gone: the record stays, and so must our knowledge of it, for whoever tries again.
                self._instances.setdefault(instance_id, ports)
                raise
        await asyncio.to_thread(self._records.forget_instance, instance_id)

    def bridge_name(self, network_id: str) -> str:
        return self._names.bridge(network_id)

    async def census(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Taps are those that exist, known or plugged into a bridge of ours; networks those of which anything stands."""
        return await asyncio.to_thread(self._look_around)

    def instances_with_ports(self) -> tuple[str, ...]:
        return tuple(sorted(self._instances))

    async def remove_everything(self) -> None:
        """Also what no record tells of: whatever bears this cloud's tag. Needs no `open`. Guests must not run."""
        await self.close()
        async with self._filter_lock:
            await stop_processes(self._names.run_dir)
            lines = [f"link del dev {name}" for name in await asyncio.to_thread(self._own_interfaces)]
            lines += [f"netns del {name}" for name in await asyncio.to_thread(self._own_namespaces)]
            await ip_batch(lines, force=True)
            await nft_load(empty_ruleset(self._names.table))
            await asyncio.to_thread(self._forget_everything)
            self._instances.clear()
            self._networks.clear()
            self._tunnels.clear()
            self._in_kernel = self._generation = None
        left = [*await asyncio.to_thread(self._own_interfaces), *await asyncio.to_thread(self._own_namespaces)]
        if left:
            raise HypervisorError(reason=f"{len(left)} interfaces or namespaces of the cloud cannot be removed")

    # --- bringing the host to what should be ---

    def _all_ports(self) -> list[PortDefinition]:
        return [port for ports in self._instances.values() for port in ports]

    def _ports_of(self, network_id: str) -> list[PortDefinition]:
        return [port for port in self._all_ports() if port.network.id == network_id]

    def _stand_unchanged(self, definitions: dict[str, NetworkDefinition], others: set[str]) -> bool:
        """These networks are recorded as they are defined here, and of the others none goes."""
        for network_id, definition in definitions.items():
            record = self._networks.get(network_id)
            if record is None or _with_latest_reach(definition, record.network) != record.network:
                return False
        return all(self._ports_of(network_id) for network_id in others)

    async def _settle_all(
        self, definitions: dict[str, NetworkDefinition], others: Iterable[str] = (), *, thorough: bool = False
    ) -> None:
        """These networks, and others of which there is no new definition."""
        for network_id in sorted({*definitions, *others}):
            await self._settle(network_id, definitions.get(network_id), thorough=thorough)

    async def _settle(
        self, network_id: str, definition: NetworkDefinition | None = None, *, thorough: bool = False
    ) -> None:
        """The network stands, as `definition` or the record says, when it has ports, else nothing of it is left.
        `thorough` also looks inside its namespace, and leaves nothing for later."""
        async with self._network_locks[network_id]:
            ports = self._ports_of(network_id)
            if not ports:
                await self._take_down(network_id)
                return
            known = self._networks.get(network_id)
            record = await self._recorded(network_id, definition or self._known_definition(network_id, ports))
            plumbing = self._plumbing(network_id)
            taps = tuple(port.tap_name for port in ports)
            changed = known is None or known.network != record.network
            is_new = await plumbing.ensure(record.network, Link(record.link_index), taps, thorough=thorough or changed)
            # Read again: ports may have come while we worked, and their callers wait for this lock.
            ports = self._ports_of(network_id)
            server = DhcpServer(self._names, network_id)
            if not await server.ensure(record.network, ports, restart=is_new, later=not thorough):
                self._tidy_later(network_id)

    def _tidy_later(self, network_id: str) -> None:
        """A DHCP server forgets a port only when it is started again, which takes longer than all else that is done when
        one goes. Nobody asks for its address meanwhile: whoever gets that next comes with a port, and it is done then."""
        if network_id in self._left:
            return

        async def tidy() -> None:
            try:
                if network_id in self._networks:
                    await self._settle(network_id, thorough=True)
            except InstarError as error:  # with the next port, or when the agent starts
                log.warning("network.dhcp_not_tidied", network_id=network_id, error=error.message)

        async def wait() -> None:
            try:
                await asyncio.sleep(DHCP_LATER_S)
            finally:
                self._left.pop(network_id, None)
            task = asyncio.create_task(tidy(), name=f"tidy DHCP {network_id}")
            self._tidying.add(task)
            task.add_done_callback(self._tidying.discard)

        self._left[network_id] = asyncio.create_task(wait(), name=f"tidy DHCP later {network_id}")

    async def _settle_tunnel(self, network_id: str, *, thorough: bool = False, announce: Iterable[str] = ()) -> None:
        """The network reaches the hosts that its record names, and these know that the guests `announce` are here."""
        async with self._network_locks[network_id]:
            record = self._networks.get(network_id)
            if record is None:  # its last port went meanwhile
                return
            network, tunnel = record.network, Tunnel(self._names, network_id, local=self._underlay)
            wanted = network.vni, remotes_of(network, self._underlay)
            changed = self._tunnels.get(network_id) != wanted
            if changed and wanted[1] and network.mtu + OVERHEAD > self._underlay_mtu:
                log.error("network.mtu_over_underlay", network_id=network_id, mtu=network.mtu, underlay=self._underlay_mtu)
            await tunnel.ensure(network, thorough=thorough or changed)
            self._tunnels[network_id] = wanted
            if wanted[1]:
                await tunnel.announce(announce)

    def _known_definition(self, network_id: str, ports: list[PortDefinition]) -> NetworkDefinition:
        record = self._networks.get(network_id)
        return record.network if record is not None else ports[-1].network

    async def _recorded(self, network_id: str, definition: NetworkDefinition) -> NetworkRecord:
        """The network's record, written before anything of it is made, with a link that is free on this host."""
        known = self._networks.get(network_id)
        if known is not None:
            definition = _with_latest_reach(definition, known.network)
            if known.network == definition:
                return known
        if known is None:
            async with turn_to_choose():
                uplink = self._names.uplink(network_id)
                routes = [route for route in await host_routes() if route.device != uplink]
                taken = [record.link_index for record in self._networks.values()]
                link = choose_link(self._names.link_seed(network_id), routes, taken)
                known = NetworkRecord(definition, link.index)
                self._networks[network_id] = known
                await asyncio.to_thread(self._records.save_network, known)
                if definition.nat:
                    # Its route appears while the turn is ours, so that the next to choose sees that it is taken.
                    await self._plumbing(network_id).ensure(definition, link, (), thorough=True)
            return known
        self._networks[network_id] = NetworkRecord(definition, known.link_index)
        await asyncio.to_thread(self._records.save_network, self._networks[network_id])
        return self._networks[network_id]

    def _plumbing(self, network_id: str) -> Plumbing:
        return Plumbing(self._names, network_id, outside=self._outside, filters=self._inner_filters)

    async def _take_down(self, network_id: str) -> None:
        await DhcpServer(self._names, network_id).ensure_stopped()
        await self._plumbing(network_id).remove()
        await asyncio.to_thread(self._records.forget_network, network_id)
        self._networks.pop(network_id, None)
        self._tunnels.pop(network_id, None)

    async def _load_filter(self) -> None:
        """The packet filter is what memory says at this moment or later. Loads that wait are done by one.

        When nothing is new it is loaded whole, for whoever asks again for what was done wants it repaired; unless the
        kernel's filter was not touched by anybody since."""
        self._filter_wanted += 1
        ticket = self._filter_wanted
        async with self._filter_lock:
            if self._filter_loaded >= ticket:
                return
            upto = self._filter_wanted
            links = {
                network_id: Reach(Link(record.link_index), record.network.vni, remotes_of(record.network, self._underlay))
                for network_id, record in self._networks.items()
            }
            parts = self._filters.of(self._all_ports())
            wanted = render_ruleset(self._names, parts, links, outside=self._outside)
            change = wanted.change(self._in_kernel) if self._in_kernel is not None else None
            before = await asyncio.to_thread(filter_generation)
            untouched = before is not None and before == self._generation
            if change is None or change or not untouched:
                self._in_kernel = self._generation = None  # unknown until the load is done
                in_part = bool(change) and await _try_change(change or "")
                if not in_part:
                    await nft_load(wanted.whole())
                # Known for sure after one load of ours and nothing else, on something that was known, or of all of it.
                after = await asyncio.to_thread(filter_generation)
                if before is not None and after == before + 1 and (untouched or not in_part):
                    self._generation = after
                self._in_kernel = wanted
            self._filter_loaded = upto

    # --- what is there ---

    def _own_namespaces(self) -> list[str]:
        names = [path.name for path in NETNS_DIR.glob("instar-*")]
        return [name for name in names if self._names.network_of_namespace(name) is not None]

    def _own_interfaces(self) -> list[str]:
        """Taps in our bridges first, then our own interfaces."""
        everything = [path.name for path in SYS_NET.iterdir()]
        own = [name for name in everything if self._names.owns_interface(name)]
        return [name for name in everything if name not in own and master_of(name) in own] + own

    def _look_around(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        interfaces = self._own_interfaces()
        taps = {name for name in interfaces if not self._names.owns_interface(name)}
        taps |= {port.tap_name for port in self._all_ports() if (SYS_NET / port.tap_name).exists()}
        networks = {self._names.network_of_namespace(name) or "" for name in self._own_namespaces()}
        for name in interfaces:
            alias = SYS_NET / name / "ifalias"
            if name not in taps and alias.exists():
                networks.add(alias.read_text().strip())  # bridges are labelled with their network
        return tuple(sorted(taps)), tuple(sorted(networks - {""}))

    def _forget_everything(self) -> None:
        self._records.forget_everything()
        remove_directory(self._names.run_dir)


def _with_latest_reach(definition: NetworkDefinition, known: NetworkDefinition) -> NetworkDefinition:
    """Definitions come with the ports of several instances, and not always in the order in which they were made."""
    if definition.reach >= known.reach:
        return definition
    return msgspec.structs.replace(definition, vni=known.vni, remotes=known.remotes, reach=known.reach)


async def _ensure_bridge_filter() -> None:
    """The kernel passes bridged packets to the filter where a bridge asks for it; without that security groups would
    silently let everything through."""
    if not await asyncio.to_thread(BRIDGE_FILTER.exists) and shutil.which("modprobe"):
        await run("modprobe", "br_netfilter")
    if not await asyncio.to_thread(BRIDGE_FILTER.exists):
        raise HypervisorError(reason="the kernel has no br_netfilter, which security groups need")


async def _try_change(text: str) -> bool:
    """False when the kernel holds something else than we thought: somebody has removed what the change builds on."""
    try:
        await nft_load(text)
    except HypervisorError:
        log.warning("network.filter_damaged", repair="loading it whole")
        return False
    return True
