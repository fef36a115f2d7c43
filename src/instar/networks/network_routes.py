"""Networks in the Network API."""

from __future__ import annotations

from collections import Counter
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
from instar.networks import schemas
from instar.networks.failures import ChangedMeanwhile, InvalidSharedSetting, NetworkInUse, NetworkNotFound
from instar.networks.listing import Kind, chosen_fields, list_answer
from instar.networks.local import LocalNetworks
from instar.networks.ownership import decided_again, given, one_or_many, project_of, require_owner, room_for, visible
from instar.networks.reach import new_vni
from instar.networks.views import View, network_view, with_subnets
from instar.store import networks as sql
from instar.store.network_records import NETWORKS, NetworkRecord

_SAMPLE = NetworkRecord("", "", "", "", False, True, 0, True, False, 0, 0)
KIND = Kind("networks", network_view(_SAMPLE))


class NetworkRoutes:
    def __init__(self, networks: LocalNetworks, limit_max: int) -> None:
        self._networks = networks
        self._store = networks.store
        self._limit_max = limit_max

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v2.0/networks", "network:networks:list", self.network_list),
            Route("POST", "/v2.0/networks", "network:networks:create", self.network_create),
            Route("GET", "/v2.0/networks/{id}", "network:networks:show", self.network_show),
            Route("PUT", "/v2.0/networks/{id}", "network:networks:update", self.network_update),
            Route("DELETE", "/v2.0/networks/{id}", "network:networks:delete", self.network_delete),
        ]

    async def network_list(self, request: Request) -> Answer:
        return await list_answer(
            request, self._store, NETWORKS, KIND, network_view, limit_max=self._limit_max, decorate=self._with_subnets
        )

    async def _with_subnets(self, views: list[View]) -> list[View]:
        subnets = await sql.subnet_ids(self._store, [view["id"] for view in views])
        return [with_subnets(view, subnets.get(view["id"], [])) for view in views]

    async def network_show(self, request: Request) -> Answer:
        network = await visible(self._store, NETWORKS, request.params["id"], request.context, NetworkNotFound)
        return json_answer({"network": chosen_fields(request, await self._view(network))})

    async def _view(self, network: NetworkRecord) -> View:
        return (await self._with_subnets([network_view(network)]))[0]

    async def network_create(self, request: Request) -> Answer:
        body = await schemas.read(request, schemas.NewNetworkBody)
        wanted, is_list = one_or_many(body.network, body.networks, "network")
        records = [self._new(one, request.context) for one in wanted]
        counts = dict(Counter(record.project_id for record in records))

        async def attempt() -> None:
            limits = await room_for(self._store, "network", self._networks.settings.networks, counts)
            conditions = {project: sql.quota_condition("network", limit) for project, limit in limits.items()}
            await self._store.write(*sql.quota_locks("network", limits), *(
                NETWORKS.insert(replace(record, vni=new_vni()), error=ChangedMeanwhile(), duplicate=ChangedMeanwhile(),
                                **conditions[record.project_id])
                for record in records
            ))  # fmt: skip

        await decided_again(attempt, "Project", request.context.project_id)
        views = [with_subnets(network_view(record), []) for record in records]
        return json_answer({"networks": views} if is_list else {"network": views[0]}, 201)

    def _new(self, wanted: schemas.NewNetwork, context: RequestContext) -> NetworkRecord:
        schemas.refuse_unserved(
            "network", router__external=wanted.router_external, is_default=wanted.is_default,
            vlan_transparent=wanted.vlan_transparent,
        )  # fmt: skip
        if wanted.shared and not context.is_admin:
            raise Forbidden(action="create_network:shared")
        now = now_us()
        return NetworkRecord(
            id=str(uuid4()),
            project_id=project_of(context, wanted.project_id, wanted.tenant_id, "create_network"),
            name=wanted.name or "", description=wanted.description or "", shared=bool(wanted.shared),
            admin_state_up=wanted.admin_state_up is not False, mtu=wanted.mtu or self._networks.settings.mtu,
            port_security=wanted.port_security_enabled is not False, nat=False, created_at=now, updated_at=now,
        )  # fmt: skip

    async def network_update(self, request: Request) -> Answer:
        changes = (await schemas.read(request, schemas.ChangedNetworkBody)).network
        schemas.refuse_unserved("network", router__external=changes.router_external, is_default=changes.is_default)
        if changes.shared is not UNSET and not request.context.is_admin:
            raise Forbidden(action="update_network:shared")
        network_id = request.params["id"]

        async def attempt() -> NetworkRecord:
            network = await visible(self._store, NETWORKS, network_id, request.context, NetworkNotFound)
            require_owner(request.context, "update_network", network.project_id)
            columns: dict[str, Any] = given(
                name=changes.name, admin_state_up=changes.admin_state_up, shared=changes.shared, mtu=changes.mtu,
                port_security=changes.port_security_enabled,
            )  # fmt: skip
            if changes.description is not UNSET:
                columns["description"] = changes.description or ""
            updated = replace(network, updated_at=now_us(), **columns)
            statements = [NETWORKS.update(updated)]
            if network.shared and not updated.shared:
                statements.append(sql.network_unshared(network, error=InvalidSharedSetting(id=network_id)))
            await self._store.write(*statements)
            if (updated.mtu, updated.admin_state_up) != (network.mtu, network.admin_state_up):
                self._networks.refresh.instances_changed(await sql.instances_of_network(self._store, network_id))
            return replace(updated, revision=network.revision + 1)

        return json_answer({"network": await self._view(await decided_again(attempt, "Network", network_id))})

    async def network_delete(self, request: Request) -> Answer:
        network = await visible(self._store, NETWORKS, request.params["id"], request.context, NetworkNotFound)
        require_owner(request.context, "delete_network", network.project_id)
        await self._store.write(*sql.network_delete(network.id, in_use=NetworkInUse(id=network.id)))
        return empty_answer()
