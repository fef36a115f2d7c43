"""The one transaction that gives an instance its ports: new ones with addresses and groups, and those that it was given.

Made by `local.py` from what it read a moment before; each statement says what it relies on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from uuid import uuid4

from instar.clock import now_us
from instar.errors import Conflict, NoFreeAddress, PortInUse, UnknownReference
from instar.model.network import FixedIp, RequestedNetwork
from instar.networks.addresses import new_mac
from instar.networks.addressing import Addressing, Held, conflict, fixed_ip, kept_by_cloud, subnet_of
from instar.networks.definitions import Topology, TopologyCache
from instar.networks.failures import ChangedMeanwhile, IpAddressInUse
from instar.networks.security_groups import chosen_groups, default_group_statements
from instar.store import networks as sql
from instar.store.contract import Result, Statement
from instar.store.network_reach import reach_grow, reach_grow_new
from instar.store.network_records import PortRecord


class Networks(Protocol):
    """Of the network service what an allocation asks."""

    @property
    def topologies(self) -> TopologyCache: ...
    @property
    def addressing(self) -> Addressing: ...
    def check_quota(self, facts: sql.AllocationFacts, wanted: int) -> int: ...


class Allocation:
    """The one transaction that gives an instance its ports, from what was read a moment before."""

    def __init__(
        self, networks: Networks, instance_id: str, project_id: str, hostname: str, owner: str,
        facts: sql.AllocationFacts, host: str = "",
    ) -> None:  # fmt: skip
        """`host`: the ports belong to it from the beginning."""
        self.statements: list[Statement] = []
        self.groups: set[str] = set()
        self.topologies: dict[str, Topology] = {}
        self._networks = networks
        self._instance_id = instance_id
        self._project_id = project_id
        self._hostname = hostname
        self._owner = owner
        self._facts = facts
        self._host = host
        self._growing: list[int] = []  # places of the statements that return networks which the host gets by this
        self._now = now_us()

    async def make(
        self,
        requested: tuple[RequestedNetwork, ...],
        security_groups: tuple[str, ...],
        held: Held,
        first: int = 0,
        port_id: str | None = None,
    ) -> list[PortRecord]:
        """Fills `statements`; returns the new ports, of which the first has this position, and `port_id` if it is given.
        Raises UnknownReference, PortInUse, NoFreeAddress."""
        self.topologies = await self._networks.topologies.get(self._facts.networks)
        limit = self._networks.check_quota(self._facts, sum(1 for one in requested if not one.port_id))
        groups: tuple[str, ...] = ()
        if any(not one.port_id for one in requested):
            self.statements += sql.quota_locks("port", {self._project_id: limit})
            groups = self._security_groups(security_groups)
        ports = []
        for position, one in enumerate(requested, first):
            if one.port_id:
                self._claim(one.port_id, position, one.tag)
            else:
                ports.append(await self._new_port(one, position, groups, limit, held, port_id))
        if self._host and len(ports) < len(requested):
            self.statements += reach_grow(self._instance_id, self._host)
            self._growing.append(len(self.statements) - 1)
            self.statements.append(sql.ports_bind(self._instance_id, self._host, self._now))
        return ports

    def grown_in(self, results: Sequence[Result]) -> list[Result]:
        """Which of what was written tells the networks that a host got or lost. `results` begin with the plan's."""
        return [results[place] for place in self._growing]

    def _security_groups(self, names: tuple[str, ...]) -> tuple[str, ...]:
        groups = chosen_groups(self._facts.groups, names)
        if groups is None:
            default, statements = default_group_statements(self._project_id)
            self.statements += statements
            others = chosen_groups(self._facts.groups, [name for name in names if name != "default"])
            groups = (default, *(others or ()))
        self.groups.update(groups)
        return groups

    def _claim(self, port_id: str, position: int, tag: str | None) -> None:
        row = self._facts.ports.get(port_id)
        if row is None:
            raise UnknownReference(kind="Port", name=port_id)
        if row["project_id"]:  # the device that has it, see `AllocationFacts.ports`
            raise PortInUse(port_id=port_id)
        self.statements.append(
            sql.port_claim(port_id, self._instance_id, self._owner, position, self._hostname, tag, self._now,
                           taken=ChangedMeanwhile())
        )  # fmt: skip

    async def _new_port(
        self, one: RequestedNetwork, position: int, groups: tuple[str, ...], limit: int, held: Held, port_id: str | None
    ) -> PortRecord:
        assert one.network_id is not None
        topology = self.topologies.get(one.network_id)
        if topology is None:
            raise UnknownReference(kind="Network", name=one.network_id)
        secured = topology.network.port_security
        address, taken = await self._address(topology, one.fixed_ip, held)
        port = PortRecord(
            id=port_id or str(uuid4()), network_id=one.network_id, project_id=self._project_id, mac_address=new_mac(),
            created_at=self._now, updated_at=self._now, fixed_ips=(address,),
            security_groups=groups if secured else (), device_id=self._instance_id, device_owner=self._owner,
            dns_name=self._hostname, port_security=secured, made_by_us=True, position=position, nic_tag=one.tag,
            host=self._host,
        )  # fmt: skip
        changed = ChangedMeanwhile()
        if self._host:
            self._growing.append(len(self.statements))
            self.statements.append(reach_grow_new(port.network_id, self._host))
        self.statements.append(
            sql.port_insert(port, network_revision=topology.network.revision, limit=limit, changed=changed,
                            duplicate=changed)
        )  # fmt: skip
        self.statements.append(sql.address_take(address.subnet_id, address.ip_address, port.id, taken=taken))
        self.statements += [sql.port_join_group(port.id, group, gone=changed) for group in port.security_groups]
        return port

    async def _address(self, topology: Topology, wanted: str | None, held: Held) -> tuple[FixedIp, Conflict]:
        """An address, and the error for the case that somebody else gets it first."""
        if wanted is not None:
            subnet = subnet_of(topology, wanted)
            if subnet is None:
                raise UnknownReference(kind="Fixed IP address", name=wanted)
            in_use = IpAddressInUse(ip_address=wanted, network_id=topology.network.id)
            if kept_by_cloud(topology, subnet, wanted):
                raise in_use
            return fixed_ip(subnet, wanted), in_use
        address = await self._networks.addressing.choose(topology, held)
        if address is None:
            raise NoFreeAddress(network_id=topology.network.id)
        return address, conflict(address.subnet_id)
