"""From records to what a host must make: networks and ports with everything resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from instar.model.network import InstancePort, NetworkDefinition, PortDefinition, SecurityRule, SubnetDefinition
from instar.store.contract import Store
from instar.store.network_records import NetworkRecord, PortRecord, SubnetRecord
from instar.store.networks import network_topology

CACHED_MAX = 4096


class Topology:
    """A network with its subnets, as of one revision of the network."""

    __slots__ = ("definition", "network", "subnets")

    def __init__(self, network: NetworkRecord, subnets: Sequence[SubnetRecord]) -> None:
        self.network = network
        self.subnets = tuple(subnets)
        self.definition = NetworkDefinition(
            id=network.id,
            mtu=network.mtu,
            nat=network.nat,
            vni=network.vni,
            subnets=tuple(
                SubnetDefinition(
                    id=subnet.id, cidr=subnet.cidr, gateway_ip=subnet.gateway_ip, dhcp_enabled=subnet.dhcp_enabled,
                    dns_nameservers=subnet.dns_nameservers, host_routes=subnet.host_routes, dhcp_ip=subnet.dhcp_ip,
                )
                for subnet in subnets
            ),
        )  # fmt: skip


class TopologyCache:
    """Networks by id and revision. Whoever asks has just read the revision, so an old entry is never used."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, Topology] = {}

    async def get(self, revisions: Mapping[str, int]) -> dict[str, Topology]:
        """The networks at these revisions or later; one that is gone is left out. No read when all are known."""
        if len(self._known) > CACHED_MAX:
            self._known.clear()
        stale = [
            network_id
            for network_id, revision in revisions.items()
            if (known := self._known.get(network_id)) is None or known.network.revision < revision
        ]
        if stale:
            for network_id, (network, subnets) in (await network_topology(self._store, stale)).items():
                self._known[network_id] = Topology(network, subnets)
        return {network_id: self._known[network_id] for network_id in revisions if network_id in self._known}


def instance_port(
    port: PortRecord,
    topology: Topology,
    rules: tuple[SecurityRule, ...],
    *,
    network: NetworkDefinition | None = None,
    arriving: bool = False,
) -> InstancePort:
    """A port or network that is administratively down lets nothing through: filtered, with no rule. `network` is the
    topology's as the port's host gets it, with the other hosts."""
    up = port.admin_state_up and topology.network.admin_state_up
    return InstancePort(
        definition=PortDefinition(
            id=port.id,
            network=network or topology.definition,
            mac_address=port.mac_address,
            fixed_ips=port.fixed_ips,
            hostname=port.dns_name,
            port_security=port.port_security or not up,
            rules=rules if up else (),
            allowed_pairs=port.allowed_pairs,
            arriving=arriving,
        ),
        network_name=topology.network.name,
        made_by_us=port.made_by_us,
        tag=port.nic_tag,
    )
