"""Ports in the Network API. Ports that servers get by themselves are made in `local.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from msgspec import UNSET
from msgspec.structs import replace

from instar.clock import now_us
from instar.errors import Forbidden
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.http.routing import Route
from instar.networks import port_plan, schemas
from instar.networks.addresses import new_mac
from instar.networks.addressing import Held
from instar.networks.definitions import Topology
from instar.networks.failures import (
    ChangedMeanwhile,
    MacAddressInUse,
    NetworkNotFound,
    PortBoundToServer,
    PortNotFound,
    SecurityGroupNotFound,
)
from instar.networks.listing import Kind, chosen_fields, list_answer
from instar.networks.local import LocalNetworks
from instar.networks.ownership import decided_again, given, one_or_many, project_of, require_owner, room_for, visible
from instar.networks.views import View, port_view
from instar.store import networks as sql
from instar.store.contract import Statement
from instar.store.network_records import NETWORKS, PORTS, SECURITY_GROUPS, NetworkRecord, PortRecord, record_list

_SAMPLE = PortRecord("", "", "", "", 0, 0)
CLOUD_OWNERS = ("network:", "neutron:")  # device owners that only the network's own project may name


class PortRoutes:
    def __init__(self, networks: LocalNetworks, limit_max: int) -> None:
        self._networks = networks
        self._store = networks.store
        self._limit_max = limit_max

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v2.0/ports", "network:ports:list", self.port_list),
            Route("POST", "/v2.0/ports", "network:ports:create", self.port_create),
            Route("GET", "/v2.0/ports/{id}", "network:ports:show", self.port_show),
            Route("PUT", "/v2.0/ports/{id}", "network:ports:update", self.port_update),
            Route("DELETE", "/v2.0/ports/{id}", "network:ports:delete", self.port_delete),
        ]

    async def port_list(self, request: Request) -> Answer:
        is_admin = request.context.is_admin

        def view(port: PortRecord) -> View:
            return port_view(port, is_admin=is_admin)

        return await list_answer(
            request, self._store, PORTS, Kind("ports", view(_SAMPLE)), view, limit_max=self._limit_max
        )

    async def port_show(self, request: Request) -> Answer:
        port = await visible(self._store, PORTS, request.params["id"], request.context, PortNotFound)
        return json_answer({"port": chosen_fields(request, port_view(port, is_admin=request.context.is_admin))})

    # --- create -------------------------------------------------------------------------------------------------------

    async def port_create(self, request: Request) -> Answer:
        body = await schemas.read(request, schemas.NewPortBody)
        wanted, is_list = one_or_many(body.port, body.ports, "port")
        context = request.context
        projects = [project_of(context, one.project_id, one.tenant_id, "create_port") for one in wanted]

        async def attempt() -> list[PortRecord]:
            limits = await room_for(self._store, "port", self._networks.settings.ports, dict(Counter(projects)))
            ports: list[PortRecord] = []
            statements: list[Statement] = sql.quota_locks("port", limits)
            with self._networks.addressing.hold() as held:
                for one, project_id in zip(wanted, projects, strict=True):
                    port, more = await self._planned(one, project_id, limits[project_id], context, held)
                    ports.append(port)
                    statements += more
                groups = {group for port in ports for group in port.security_groups}
                await self._store.write(*statements, *self._networks.refresh.noting(members=groups))
            self._networks.refresh.members_changed(groups, noted=True)
            return ports

        ports = await decided_again(attempt, "Network", wanted[0].network_id)
        views = [port_view(port, is_admin=context.is_admin) for port in ports]
        return json_answer({"ports": views} if is_list else {"port": views[0]}, 201)

    async def _planned(
        self, wanted: schemas.NewPort, project_id: str, limit: int, context: RequestContext, held: Held
    ) -> tuple[PortRecord, list[Statement]]:
        """A port and the statements that make it, addresses and groups included."""
        network = await visible(self._store, NETWORKS, wanted.network_id, context, NetworkNotFound)
        _check_privileges(wanted, network, context)
        topology = await self._topology(network)
        secured = network.port_security if wanted.port_security_enabled is None else wanted.port_security_enabled
        addresses = await port_plan.choose_addresses(wanted.fixed_ips, topology, (), self._networks.addressing, held)
        mac = new_mac() if wanted.mac_address is None else port_plan.read_mac(wanted.mac_address, "$.port.mac_address")
        groups: tuple[str, ...] = ()
        if wanted.security_groups is not None:
            groups = await self._groups(wanted.security_groups, context)
        elif secured:
            groups = (await self._networks.default_group(project_id),)
        now = now_us()
        port = PortRecord(
            id=str(uuid4()), network_id=network.id, project_id=project_id, mac_address=mac, created_at=now,
            updated_at=now, fixed_ips=tuple(addresses), security_groups=groups, name=wanted.name or "",
            description=wanted.description or "", admin_state_up=wanted.admin_state_up is not False,
            device_id=wanted.device_id or "", device_owner=wanted.device_owner or "", host=wanted.host_id or "",
            port_security=secured, allowed_pairs=port_plan.read_pairs(wanted.allowed_address_pairs, mac),
        )  # fmt: skip
        port_plan.check_security(port)
        changed = ChangedMeanwhile()
        in_use = MacAddressInUse(network_id=network.id, mac_address=mac)
        insert = sql.port_insert(
            port, network_revision=topology.network.revision, limit=limit, changed=changed,
            duplicate=changed if wanted.mac_address is None else in_use,
        )  # fmt: skip
        return port, [insert, *_have(port, wanted.fixed_ips)]

    async def _topology(self, network: NetworkRecord) -> Topology:
        topology = (await self._networks.topologies.get({network.id: network.revision})).get(network.id)
        if topology is None:
            raise ChangedMeanwhile()
        return topology

    async def _groups(self, wanted: Sequence[str], context: RequestContext) -> tuple[str, ...]:
        """Ids of groups that the caller has. Raises SecurityGroupNotFound."""
        ids = tuple(dict.fromkeys(wanted))
        viewer = None if context.is_admin else context.project_id
        found = {group.id for group in await record_list(self._store, SECURITY_GROUPS, viewer=viewer, equal={"id": ids})}
        for group_id in ids:
            if group_id not in found:
                raise SecurityGroupNotFound(id=group_id)
        return ids

    # --- update, delete -----------------------------------------------------------------------------------------------

    async def port_update(self, request: Request) -> Answer:
        changes = (await schemas.read(request, schemas.ChangedPortBody)).port
        port_id, context = request.params["id"], request.context

        async def attempt() -> PortRecord:
            port = await visible(self._store, PORTS, port_id, context, PortNotFound)
            network = (await record_list(self._store, NETWORKS, viewer=None, equal={"id": [port.network_id]}))[0]
            _check_privileges(changes, network, context)
            with self._networks.addressing.hold() as held:
                updated, statements = await self._changed(port, network, changes, context, held)
                members, instances = _told(port, updated)
                noted = self._networks.refresh.noting(members=members, instances=instances)
                await self._store.write(*statements, *noted)
            self._networks.refresh.members_changed(members, noted=True)
            self._networks.refresh.instances_changed(instances, noted=True)
            return replace(updated, revision=port.revision + 1)

        updated = await decided_again(attempt, "Port", port_id)
        return json_answer({"port": port_view(updated, is_admin=context.is_admin)})

    async def _changed(
        self, port: PortRecord, network: NetworkRecord, changes: schemas.ChangedPort, context: RequestContext, held: Held
    ) -> tuple[PortRecord, list[Statement]]:
        columns: dict[str, Any] = given(
            name=changes.name, admin_state_up=changes.admin_state_up, port_security=changes.port_security_enabled
        )
        for column, value in (
            ("description", changes.description), ("device_id", changes.device_id),
            ("device_owner", changes.device_owner), ("host", changes.host_id),
        ):  # fmt: skip
            if value is not UNSET:
                columns[column] = value or ""
        mac = port.mac_address
        if changes.mac_address is not UNSET:
            mac = columns["mac_address"] = port_plan.read_mac(changes.mac_address, "$.port.mac_address")
        if changes.allowed_address_pairs is not UNSET:
            columns["allowed_pairs"] = port_plan.read_pairs(changes.allowed_address_pairs, mac)
        if changes.security_groups is not UNSET:
            columns["security_groups"] = await self._groups(changes.security_groups or (), context)
        statements: list[Statement] = []
        wanted: Sequence[schemas.WantedIp] = ()
        if changes.fixed_ips is not UNSET:
            wanted = changes.fixed_ips or ()
            topology = await self._topology(network)
            columns["fixed_ips"] = tuple(
                await port_plan.choose_addresses(wanted, topology, port.fixed_ips, self._networks.addressing, held)
            )
            statements.append(sql.network_at(network.id, topology.network.revision, ChangedMeanwhile()))
        updated = replace(port, updated_at=now_us(), **columns)
        port_plan.check_security(updated)
        _check_bound(port, updated)
        in_use = MacAddressInUse(network_id=network.id, mac_address=updated.mac_address)
        statements.append(PORTS.update(updated, duplicate=in_use))
        if (updated.fixed_ips, updated.security_groups) != (port.fixed_ips, port.security_groups):
            statements += [*sql.port_leave_all(port.id), *_have(updated, wanted)]
        return updated, statements

    async def port_delete(self, request: Request) -> Answer:
        port = await visible(self._store, PORTS, request.params["id"], request.context, PortNotFound)
        in_use = PortBoundToServer(id=port.id, instance_id=port.device_id)
        try:
            noted = self._networks.refresh.noting(members=port.security_groups)
            await self._store.write(sql.port_delete(port.id, in_use=in_use), *noted)
        except PortBoundToServer:
            await visible(self._store, PORTS, port.id, request.context, PortNotFound)  # or somebody else deleted it
            raise
        self._networks.refresh.members_changed(port.security_groups, noted=True)
        return empty_answer()


def _told(port: PortRecord, updated: PortRecord) -> tuple[set[str], set[str]]:
    """Whose packet filters depend on what has changed: groups by their members, and instances."""
    groups: set[str] = set()
    if (port.fixed_ips, port.security_groups, port.allowed_pairs) != (
        updated.fixed_ips, updated.security_groups, updated.allowed_pairs,
    ):  # fmt: skip
        groups = {*port.security_groups, *updated.security_groups}
    return groups, {updated.device_id} if updated.position is not None and updated.host else set()


def _have(port: PortRecord, wanted: Sequence[schemas.WantedIp] | None) -> list[Statement]:
    """The port has its addresses and is in its groups."""
    return [
        *port_plan.take(port.fixed_ips, port.id, wanted, port.network_id),
        *(sql.port_join_group(port.id, group, gone=ChangedMeanwhile()) for group in port.security_groups),
    ]


def _check_privileges(
    wanted: schemas.NewPort | schemas.ChangedPort, network: NetworkRecord, context: RequestContext
) -> None:
    """On a shared network only its own project, and admins, may do what could harm the others on it."""
    verb = "create_port" if isinstance(wanted, schemas.NewPort) else "update_port"
    port_plan.check_binding(wanted.vnic_type, wanted.profile)
    if wanted.host_id not in (None, UNSET) and not context.is_admin:
        raise Forbidden(action=f"{verb}:binding:host_id")
    for name, value in (
        ("mac_address", wanted.mac_address), ("port_security_enabled", wanted.port_security_enabled),
        ("allowed_address_pairs", wanted.allowed_address_pairs),
    ):  # fmt: skip
        if value not in (None, UNSET, []):
            require_owner(context, f"{verb}:{name}", network.project_id)
    if isinstance(wanted.device_owner, str) and wanted.device_owner.startswith(CLOUD_OWNERS):
        require_owner(context, f"{verb}:device_owner", network.project_id)


def _check_bound(port: PortRecord, updated: PortRecord) -> None:
    """What a server's guest has been given is not taken from it by the port's back door."""
    if port.position is None:
        return
    if any(
        getattr(port, name) != getattr(updated, name)
        for name in ("mac_address", "fixed_ips", "device_id", "device_owner", "host")
    ):
        raise PortBoundToServer(id=port.id, instance_id=port.device_id)
