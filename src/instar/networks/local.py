"""The embedded network service: what the lifecycle needs of networks, on the store. The Network API is in `api/`.

One instance with one network costs a read and one transaction. What was read may be out of date when the transaction
runs; each statement says what it relies on, and the whole is decided anew when that is not so any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from instar.bus.contract import Bus
from instar.clock import now_us
from instar.config import NetworkSettings
from instar.errors import BadRequest, Conflict, PortInUse, QuotaExceeded, UnknownReference
from instar.model.network import InstancePort, NetworkDefinition, RequestedNetwork
from instar.networks.addressing import Addressing, kept_by_cloud, subnet_of
from instar.networks.allocation import Allocation
from instar.networks.bootstrap import bootstrap_statements, host_nameservers
from instar.networks.definitions import Topology, TopologyCache, instance_port
from instar.networks.failures import ChangedMeanwhile
from instar.networks.filter_notes import FilterNotes
from instar.networks.filter_refresh import FilterChanges, FilterRefresh, PortsChanged
from instar.networks.instance_groups import change_instance_groups
from instar.networks.reach import Reach, reaching
from instar.networks.security_groups import (
    DEFAULT,
    RecentMembers,
    RemoteMembers,
    chosen_groups,
    ensure_default_group,
    host_rules,
)
from instar.store import networks as sql
from instar.store.contract import Result, Store, WriteConflict
from instar.store.network_reach import ports_bind_ahead, reach_grow, reach_grow_without
from instar.store.network_records import PORTS, PortRecord, record_list
from instar.store.security_groups import groups_of_project

log = structlog.get_logger()

ATTEMPTS_MAX = 100  # each one that fails means that somebody else got on
RESOLV_CONF = Path("/etc/resolv.conf")
_GROUPS = msgspec.json.Decoder(tuple[str, ...])


class LocalNetworks:
    """A `NetworkService`. `ports_changed` is told which instances need fresh packet filters: see `filter_refresh`. With
    `keeper_on`, the bus of a cloud of several processes, the one that keeps filters is told instead: `filter_notes`."""

    participant = "network"  # in the diagrams of operations

    def __init__(
        self,
        store: Store,
        settings: NetworkSettings,
        ports_changed: PortsChanged | None = None,
        *,
        keeper_on: Bus | None = None,
    ) -> None:
        self.store = store
        self.settings = settings
        self.refresh: FilterChanges = (
            FilterRefresh(store, ports_changed) if keeper_on is None else FilterNotes(store, keeper_on)
        )
        self.addressing = Addressing(store)
        self.topologies = TopologyCache(store)
        self.reach = Reach(store)
        self._members = RemoteMembers(store)
        self._recent_members = RecentMembers(store)

    async def close(self) -> None:
        """Stop telling of changes."""
        await self.refresh.close()

    async def bootstrap(self, cidr: str, *, project_id: str = "", resolv_conf: Path = RESOLV_CONF) -> str:
        """The shared network `private` with `private-subnet` on `cidr`, made where no such network is yet.

        Returns its id. The host is its router; DNS servers are those of the host."""
        existing = await sql.network_first_nat(self.store)
        if existing is not None:
            return existing
        nameservers = await host_nameservers(resolv_conf)
        network, statements = bootstrap_statements(cidr, self.settings.mtu, project_id, nameservers)
        try:
            await self.store.write(*statements)
        except WriteConflict:  # another process was first
            existing = await sql.network_first_nat(self.store)
            if existing is None:
                raise
            return existing
        log.info("networks.bootstrapped", network=network.id, cidr=cidr)
        return network.id

    # --- before a build is accepted -----------------------------------------------------------------------------------

    async def resolve(
        self, requested: tuple[RequestedNetwork, ...] | None, *, project_id: str, is_admin: bool, count: int
    ) -> tuple[RequestedNetwork, ...]:
        if requested is None:
            requested = await self._only_network(project_id)
        network_ids = [one.network_id for one in requested if one.network_id and not one.port_id]
        port_ids = [one.port_id for one in requested if one.port_id]
        facts = await self._facts("", project_id, network_ids, port_ids)
        topologies = await self.topologies.get(facts.networks)
        ports = {}
        if port_ids:
            visible = None if is_admin else project_id
            ports = {port.id: port for port in await record_list(
                self.store, PORTS, viewer=visible, equal={"id": port_ids})}  # fmt: skip
        fixed: set[tuple[str, str]] = set()
        for one in requested:
            if one.port_id:
                _check_port(one.port_id, ports.get(one.port_id))
                continue
            assert one.network_id is not None
            topology = topologies.get(one.network_id)
            record = topology.network if topology else None
            if topology is None or record is None or not (
                is_admin or record.shared or record.project_id == project_id
            ):
                raise UnknownReference(kind="Network", name=one.network_id)
            if not topology.subnets:
                raise BadRequest(f"Network {one.network_id} requires a subnet in order to boot instances on.")
            if one.fixed_ip:
                await self._check_fixed_ip(topology, one.fixed_ip)
                if (one.network_id, one.fixed_ip) in fixed:
                    raise BadRequest(f"Fixed IP address {one.fixed_ip} is asked for twice.")
                fixed.add((one.network_id, one.fixed_ip))
        self.check_quota(facts, len(network_ids) * count)
        return requested

    async def _only_network(self, project_id: str) -> tuple[RequestedNetwork, ...]:
        usable = await sql.networks_usable(self.store, project_id)
        if len(usable) > 1:
            raise Conflict("Multiple possible networks found, use a Network ID to be more specific.")
        return tuple(RequestedNetwork(network_id=row["id"]) for row in usable)

    async def _check_fixed_ip(self, topology: Topology, ip_address: str) -> None:
        subnet = subnet_of(topology, ip_address)
        if subnet is None:
            raise BadRequest(f"Fixed IP address {ip_address} is not a valid ip address for network {topology.network.id}.")
        taken = kept_by_cloud(topology, subnet, ip_address)
        if taken or await sql.address_is_used(self.store, subnet.id, ip_address):
            raise BadRequest(f"Fixed IP address {ip_address} is already in use on network {topology.network.id}.")

    async def _facts(
        self, instance_id: str, project_id: str, network_ids: Sequence[str], port_ids: Sequence[str]
    ) -> sql.AllocationFacts:
        counted = self.settings.ports >= 0
        return await sql.allocation_facts(self.store, instance_id, project_id, network_ids, port_ids, counted=counted)

    def check_quota(self, facts: sql.AllocationFacts, wanted: int) -> int:
        """The port limit of the project. Raises QuotaExceeded when `wanted` more ports are over it."""
        limit = self.settings.ports if facts.ports_limit is None else facts.ports_limit
        if wanted and 0 <= limit < facts.ports_used + wanted:
            raise QuotaExceeded(resource="ports", requested=wanted, used=facts.ports_used, limit=limit)
        return limit

    async def security_groups_exist(self, names: tuple[str, ...], *, project_id: str) -> tuple[str, ...]:
        if all(name == DEFAULT for name in names):
            return names  # every project has it, and made by itself where it was not used yet
        groups = await groups_of_project(self.store, project_id)
        chosen_groups(groups, names)
        name_of = {row["id"]: row["name"] for row in groups}
        return tuple(name_of.get(name, name) for name in names)

    async def set_security_group(self, instance_id: str, name: str, *, project_id: str, member: bool) -> str:
        return await change_instance_groups(
            self.store, self.refresh, instance_id, name, project_id=project_id, member=member
        )

    # --- allocate -----------------------------------------------------------------------------------------------------

    async def allocate(
        self,
        instance_id: str,
        *,
        project_id: str,
        hostname: str,
        requested: tuple[RequestedNetwork, ...],
        security_groups: tuple[str, ...],
        availability_zone: str,
        host: str = "",
    ) -> tuple[InstancePort, ...]:
        """As the contract says; the definitions have no rules yet: what a host plugs is what `bind` returns.

        Also raises IpAddressInUse for a fixed address that was taken since `resolve`, QuotaExceeded likewise."""
        if not requested:
            return ()
        network_ids = [one.network_id for one in requested if one.network_id and not one.port_id]
        port_ids = [one.port_id for one in requested if one.port_id]
        for _ in range(ATTEMPTS_MAX):
            facts = await self._facts(instance_id, project_id, network_ids, port_ids)
            if facts.own_ports:
                return await self.bind(instance_id, host=host) if host else await self.ports_of(instance_id)
            owner = f"compute:{availability_zone or 'nova'}"
            plan = Allocation(self, instance_id, project_id, hostname, owner, facts, host)
            # Most builds come while it is known that there is a large group.
            noted = host != "" and self._recent_members.in_use
            try:
                with self.addressing.hold() as held:
                    ports = await plan.make(requested, security_groups or ("default",), held)
                    noting = self.refresh.noting(members=plan.groups, instances=[instance_id] if noted else ())
                    results = await self.store.write(*plan.statements, *noting)
            except (ChangedMeanwhile, WriteConflict):
                continue
            self.refresh.members_changed(plan.groups, noted=True)
            if host:
                await self._hosts_changed(*plan.grown_in(results))
                return await self._bound(instance_id, noted=noted)
            if port_ids:
                return await self.ports_of(instance_id)
            return tuple(instance_port(port, plan.topologies[port.network_id], ()) for port in ports)
        raise Conflict("The network is being changed by others again and again: try once more.")

    async def attach(
        self,
        instance_id: str,
        port_id: str,
        *,
        project_id: str,
        hostname: str,
        requested: RequestedNetwork,
        security_groups: tuple[str, ...],
        availability_zone: str,
    ) -> InstancePort:
        """As the contract says; raises IpAddressInUse and QuotaExceeded, too."""
        network_ids = [requested.network_id] if requested.network_id and not requested.port_id else []
        port_ids = [requested.port_id] if requested.port_id else []
        for _ in range(ATTEMPTS_MAX):
            had = await sql.ports_of_instances(self.store, [instance_id])
            if any(one.port.id == port_id for one in had):
                return next(port for port in await self.ports_of(instance_id) if port.definition.id == port_id)
            facts = await self._facts(instance_id, project_id, network_ids, port_ids)
            plan = Allocation(self, instance_id, project_id, hostname, f"compute:{availability_zone or 'nova'}", facts)
            position = max((one.port.position or 0 for one in had), default=-1) + 1
            try:
                with self.addressing.hold() as held:
                    await plan.make((requested,), security_groups or ("default",), held, position, port_id)
                    await self.store.write(*plan.statements, *self.refresh.noting(members=plan.groups))
            except (ChangedMeanwhile, WriteConflict):
                continue
            self.refresh.members_changed(plan.groups, noted=True)
        raise Conflict("The network is being changed by others again and again: try once more.")

    # --- bind, release ------------------------------------------------------------------------------------------------

    async def bind(self, instance_id: str, *, host: str) -> tuple[InstancePort, ...]:
        await self._bind(instance_id, host)
        return await self._bound(instance_id)

    async def _bound(self, instance_id: str, *, noted: bool = False) -> tuple[InstancePort, ...]:
        """`noted`: that its filters are to be told again was written with its ports."""
        ports = (await self._ports_of([instance_id], self._recent_members)).get(instance_id, ())
        if self._recent_members.in_use:
            self.refresh.instances_changed([instance_id], noted=noted)
        return ports

    async def unbind(self, instance_id: str) -> None:
        await self._bind(instance_id, "")

    async def _bind(self, instance_id: str, host: str) -> None:
        *_, grown, _ = await self.store.write(
            *reach_grow(instance_id, host), sql.ports_bind(instance_id, host, now_us())
        )
        await self._hosts_changed(grown)

    async def bind_ahead(self, instance_id: str, *, host: str) -> tuple[InstancePort, ...]:
        grown, _ = await self.store.write(*ports_bind_ahead(instance_id, host, now_us()))
        await self._hosts_changed(grown)
        return (await self._ports_of([instance_id], self._members, arriving_at=host)).get(instance_id, ())

    async def unbind_ahead(self, instance_id: str) -> None:
        grown, _ = await self.store.write(*ports_bind_ahead(instance_id, "", now_us()))
        await self._hosts_changed(grown)

    async def release(self, instance_id: str) -> None:
        *_, grown, deleted, _ = await self.store.write(
            *self.refresh.noting_leavers(instance_id),
            *reach_grow(instance_id, ""),
            *sql.ports_release(instance_id, now_us()),
        )
        await self._hosts_changed(grown)
        self.refresh.members_changed(groups_in([deleted]), noted=True)

    async def release_port(self, instance_id: str, port_id: str) -> None:
        *_, grown, deleted, _ = await self.store.write(
            *self.refresh.noting_leavers(instance_id, port_id),
            *reach_grow_without(instance_id, port_id),
            *sql.port_release(instance_id, port_id, now_us()),
        )
        await self._hosts_changed(grown)
        self.refresh.members_changed(groups_in([deleted]), noted=True)

    async def _hosts_changed(self, *grown: Result) -> None:
        """`grown` tell the networks that a host got or lost."""
        networks = {row["id"] for one in grown for row in one.rows}
        if networks and await self.reach.over_hosts():
            self.refresh.hosts_changed(networks)

    # --- reads --------------------------------------------------------------------------------------------------------

    async def ports_of(self, instance_id: str) -> tuple[InstancePort, ...]:
        return (await self.ports_of_instances([instance_id])).get(instance_id, ())

    async def ports_of_instances(self, instance_ids: Sequence[str]) -> dict[str, tuple[InstancePort, ...]]:
        """Fresh definitions of many instances at once: what a host needs after `ports_changed`. No port, no key."""
        return await self._ports_of(instance_ids, self._members)

    async def _ports_of(
        self, instance_ids: Sequence[str], members: RemoteMembers, *, arriving_at: str = ""
    ) -> dict[str, tuple[InstancePort, ...]]:
        """As their hosts get them, or the host that they are arriving at."""
        found = await sql.ports_of_instances(self.store, instance_ids)
        topologies = await self.topologies.get({one.port.network_id: one.network_revision for one in found})
        reaches = {one.port.network_id: one.network_reach for one in found}
        hosts = await self.reach.members(reaches, {arriving_at, *(one.port.host for one in found)} - {""})
        rules = await host_rules(self.store, [one.port for one in found], members)
        made: dict[str, list[InstancePort]] = {}
        networks: dict[tuple[str, str], NetworkDefinition] = {}
        for port, _, _ in found:
            topology = topologies.get(port.network_id)
            if topology is None:
                continue
            key = port.network_id, arriving_at or port.host
            if key not in networks:
                networks[key] = reaching(topology.definition, reaches[key[0]], hosts[key[0]], key[1])
            port_rules, arriving = rules.get(port.id, ()), bool(arriving_at) and arriving_at != port.host
            made.setdefault(port.device_id, []).append(
                instance_port(port, topology, port_rules, network=networks[key], arriving=arriving)
            )
        return {instance_id: tuple(ports) for instance_id, ports in made.items()}

    async def port_owners(self) -> dict[str, str]:
        return await sql.port_owners(self.store)

    async def default_group(self, project_id: str) -> str:
        """The id of the project's default security group, made at its first use."""
        return await ensure_default_group(self.store, project_id)


def groups_in(results: Sequence[Result]) -> set[str]:
    """Group ids in the `security_groups` columns that statements returned."""
    return {group for result in results for row in result.rows for group in _GROUPS.decode(row["security_groups"])}


def _check_port(port_id: str, port: PortRecord | None) -> None:
    if port is None:
        raise UnknownReference(kind="Port", name=port_id)
    if port.device_id:
        raise PortInUse(port_id=port_id)
    if not port.fixed_ips:
        raise BadRequest(f"Port {port_id} requires a FixedIP in order to be used.")
