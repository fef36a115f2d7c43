"""Subnets in the Network API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Network
from typing import Any
from uuid import uuid4

from msgspec import UNSET
from msgspec.structs import replace

from instar.clock import now_us
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.http.routing import Route
from instar.networks import schemas, subnet_plan
from instar.networks.failures import (
    ChangedMeanwhile,
    InvalidInput,
    IpAddressInUse,
    NetworkNotFound,
    SubnetInUse,
    SubnetNotFound,
    SubnetsOverlap,
)
from instar.networks.listing import Kind, chosen_fields, list_answer
from instar.networks.local import LocalNetworks
from instar.networks.ownership import decided_again, given, one_or_many, project_of, require_owner, room_for, visible
from instar.networks.views import subnet_view
from instar.store import networks as sql
from instar.store.contract import Statement
from instar.store.network_records import NETWORKS, SUBNETS, NetworkRecord, SubnetRecord

_SAMPLE = SubnetRecord("", "", "", "", "", "", None, True, None, (), (), (), 0, 0)
KIND = Kind("subnets", subnet_view(_SAMPLE))


class SubnetRoutes:
    def __init__(self, networks: LocalNetworks, limit_max: int) -> None:
        self._networks = networks
        self._store = networks.store
        self._limit_max = limit_max

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v2.0/subnets", "network:subnets:list", self.subnet_list),
            Route("POST", "/v2.0/subnets", "network:subnets:create", self.subnet_create),
            Route("GET", "/v2.0/subnets/{id}", "network:subnets:show", self.subnet_show),
            Route("PUT", "/v2.0/subnets/{id}", "network:subnets:update", self.subnet_update),
            Route("DELETE", "/v2.0/subnets/{id}", "network:subnets:delete", self.subnet_delete),
        ]

    async def subnet_list(self, request: Request) -> Answer:
        return await list_answer(request, self._store, SUBNETS, KIND, subnet_view, limit_max=self._limit_max)

    async def subnet_show(self, request: Request) -> Answer:
        subnet = await visible(self._store, SUBNETS, request.params["id"], request.context, SubnetNotFound)
        return json_answer({"subnet": chosen_fields(request, subnet_view(subnet))})

    # --- create -------------------------------------------------------------------------------------------------------

    async def subnet_create(self, request: Request) -> Answer:
        body = await schemas.read(request, schemas.NewSubnetBody)
        wanted, is_list = one_or_many(body.subnet, body.subnets, "subnet")
        context = request.context

        async def attempt() -> list[SubnetRecord]:
            records: list[SubnetRecord] = []
            statements: list[Statement] = []
            for one in wanted:
                network = await visible(self._store, NETWORKS, one.network_id, context, NetworkNotFound)
                require_owner(context, "create_subnet", network.project_id)
                topology = await self._networks.topologies.get({network.id: network.revision})
                if network.id not in topology:
                    raise ChangedMeanwhile()
                if all(record.network_id != network.id for record in records):
                    # The revision of what is looked at below, not of what was read before.
                    revision = topology[network.id].network.revision
                    statements.append(sql.network_at(network.id, revision, ChangedMeanwhile()))
                beside = [*topology[network.id].subnets, *(one for one in records if one.network_id == network.id)]
                records.append(_new(one, network, context, beside))
            counts = dict(Counter(record.project_id for record in records))
            limits = await room_for(self._store, "subnet", self._networks.settings.subnets, counts)
            statements += sql.quota_locks("subnet", limits)
            statements += [
                SUBNETS.insert(record, error=ChangedMeanwhile(), **sql.quota_condition("subnet", limits[record.project_id]))
                for record in records
            ]  # fmt: skip
            await self._store.write(*statements)
            return records

        records = await decided_again(attempt, "Network", wanted[0].network_id)
        await self._tell({record.network_id for record in records})
        views = [subnet_view(record) for record in records]
        return json_answer({"subnets": views} if is_list else {"subnet": views[0]}, 201)

    async def _tell(self, network_ids: set[str]) -> None:
        """Hosts that have the network get it anew."""
        for network_id in network_ids:
            self._networks.refresh.instances_changed(await sql.instances_of_network(self._store, network_id))

    # --- update, delete -----------------------------------------------------------------------------------------------

    async def subnet_update(self, request: Request) -> Answer:
        changes = (await schemas.read(request, schemas.ChangedSubnetBody)).subnet
        schemas.refuse_unserved("subnet", dns_publish_fixed_ip=changes.dns_publish_fixed_ip)
        subnet_id, context = request.params["id"], request.context

        async def attempt() -> SubnetRecord:
            subnet = await visible(self._store, SUBNETS, subnet_id, context, SubnetNotFound)
            network = await visible(self._store, NETWORKS, subnet.network_id, context, SubnetNotFound)
            require_owner(context, "update_subnet", subnet.project_id, network.project_id)
            updated = await self._changed(subnet, network, changes)
            await self._store.write(
                sql.network_at(network.id, network.revision, ChangedMeanwhile()), SUBNETS.update(updated)
            )
            if _plugged(updated) != _plugged(subnet):
                await self._tell({network.id})
            return replace(updated, revision=subnet.revision + 1)

        return json_answer({"subnet": subnet_view(await decided_again(attempt, "Subnet", subnet_id))})

    async def _changed(self, subnet: SubnetRecord, network: NetworkRecord, changes: schemas.ChangedSubnet) -> SubnetRecord:
        columns: dict[str, Any] = given(name=changes.name, dhcp_enabled=changes.enable_dhcp)
        if changes.description is not UNSET:
            columns["description"] = changes.description or ""
        if changes.dns_nameservers is not UNSET:
            columns["dns_nameservers"] = subnet_plan.read_nameservers(changes.dns_nameservers)
        if changes.host_routes is not UNSET:
            columns["host_routes"] = subnet_plan.read_routes(changes.host_routes)
        cidr, gateway_ip, pools = IPv4Network(subnet.cidr), subnet.gateway_ip, subnet.allocation_pools
        used = await sql.addresses_used(self._store, subnet.id)
        if changes.gateway_ip is not UNSET:
            gateway_ip = subnet_plan.read_gateway(changes.gateway_ip, cidr)
            if network.nat and gateway_ip in used:
                raise IpAddressInUse(ip_address=gateway_ip, network_id=network.id)
        if changes.allocation_pools is not UNSET:
            pools = subnet_plan.read_pools(changes.allocation_pools, cidr, gateway_ip)
        subnet_plan.check_gateway(pools, gateway_ip)
        dhcp_ip = subnet_plan.dhcp_address(
            cidr, gateway_ip, pools, nat=network.nat, enabled=columns.get("dhcp_enabled", subnet.dhcp_enabled), used=used,
            now=subnet.dhcp_ip,
        )  # fmt: skip
        return replace(
            subnet, **columns, gateway_ip=gateway_ip, allocation_pools=pools, dhcp_ip=dhcp_ip, updated_at=now_us()
        )

    async def subnet_delete(self, request: Request) -> Answer:
        subnet = await visible(self._store, SUBNETS, request.params["id"], request.context, SubnetNotFound)
        network = await visible(self._store, NETWORKS, subnet.network_id, request.context, SubnetNotFound)
        require_owner(request.context, "delete_subnet", subnet.project_id, network.project_id)
        await self._store.write(*sql.subnet_delete(subnet, now_us(), in_use=SubnetInUse(id=subnet.id)))
        await self._tell({network.id})
        return empty_answer()


def _new(
    wanted: schemas.NewSubnet, network: NetworkRecord, context: RequestContext, beside: Sequence[SubnetRecord]
) -> SubnetRecord:
    if wanted.ip_version != 4:
        raise InvalidInput(reason="this cloud serves IPv4: ip_version must be 4", path="$.subnet.ip_version")
    schemas.refuse_unserved(
        "subnet", prefixlen=wanted.prefixlen, use_default_subnet_pool=wanted.use_default_subnet_pool,
        dns_publish_fixed_ip=wanted.dns_publish_fixed_ip,
    )  # fmt: skip
    cidr = subnet_plan.read_cidr(wanted.cidr, "$.subnet.cidr")
    if any(cidr.overlaps(IPv4Network(other.cidr)) for other in beside):
        raise SubnetsOverlap(cidr=str(cidr), network_id=network.id)
    gateway_ip = subnet_plan.read_gateway(wanted.gateway_ip, cidr)
    pools = subnet_plan.read_pools(wanted.allocation_pools, cidr, gateway_ip)
    enabled = wanted.enable_dhcp is not False
    now = now_us()
    return SubnetRecord(
        id=str(uuid4()), network_id=network.id,
        project_id=project_of(context, wanted.project_id, wanted.tenant_id, "create_subnet"),
        name=wanted.name or "", description=wanted.description or "", cidr=str(cidr), gateway_ip=gateway_ip,
        dhcp_enabled=enabled,
        dhcp_ip=subnet_plan.dhcp_address(
            cidr, gateway_ip, pools, nat=network.nat, enabled=enabled, used=(), now=None
        ),
        dns_nameservers=subnet_plan.read_nameservers(wanted.dns_nameservers),
        host_routes=subnet_plan.read_routes(wanted.host_routes), allocation_pools=pools, created_at=now, updated_at=now,
    )  # fmt: skip


def _plugged(subnet: SubnetRecord) -> tuple[object, ...]:
    """What a host makes of a subnet."""
    return (
        subnet.gateway_ip, subnet.dhcp_enabled, subnet.dhcp_ip, subnet.dns_nameservers, subnet.host_routes
    )  # fmt: skip
