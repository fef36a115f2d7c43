"""What can be read below a server besides itself: addresses, interfaces, security groups, topology …"""

from __future__ import annotations

from typing import Any

from instar.api.resource import ApiRoute, Compute
from instar.api.servers.listing import visible_instance
from instar.api.servers.view import addresses
from instar.errors import NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.model.instance import Instance
from instar.model.network import InstancePort
from instar.model.states import PowerState

PORT_TAG_SINCE = 70


class ServerParts:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        path, name = "/servers/{server_id}", "os_compute_api:"
        return [
            ApiRoute("GET", path + "/ips", name + "ips:index", self.ips),
            ApiRoute("GET", path + "/ips/{network}", name + "ips:show", self.ips_of_network),
            ApiRoute("GET", path + "/os-interface", name + "os-attach-interfaces:list", self.interfaces),
            ApiRoute("GET", path + "/os-interface/{port_id}", name + "os-attach-interfaces:show", self.interface),
            ApiRoute("GET", path + "/os-security-groups", name + "os-security-groups:list", self.security_groups),
            ApiRoute("GET", path + "/os-server-password", name + "os-server-password:show", self.password),
            ApiRoute("DELETE", path + "/os-server-password", name + "os-server-password:clear", self.no_password),
            ApiRoute("GET", path + "/topology", name + "server:topology:index", self.topology, since=78),
        ]

    async def _server(self, request: Request) -> Instance:
        return await visible_instance(self._compute, request.context, request.params["server_id"])

    async def ips(self, request: Request) -> Answer:
        shown = {name: _plain(found) for name, found in addresses(await self._server(request)).items()}
        return json_answer({"addresses": shown})

    async def ips_of_network(self, request: Request) -> Answer:
        found = addresses(await self._server(request))
        network = request.params["network"]
        if network not in found:
            raise NotFound("Instance is not a member of specified network")
        return json_answer({network: _plain(found[network])})

    async def interfaces(self, request: Request) -> Answer:
        instance = await self._server(request)
        found = [interface_view(instance, port, request.microversion) for port in instance.facts.ports]
        return json_answer({"interfaceAttachments": found})

    async def interface(self, request: Request) -> Answer:
        instance = await self._server(request)
        for port in instance.facts.ports:
            if port.definition.id == request.params["port_id"]:
                return json_answer({"interfaceAttachment": interface_view(instance, port, request.microversion)})
        raise NotFound(f"No interface with port {request.params['port_id'][:80]} is attached to {instance.id}.")

    async def security_groups(self, request: Request) -> Answer:
        instance = await self._server(request)
        spec = instance.spec
        groups = [
            {"id": group, "name": name, "description": "", "tenant_id": instance.project_id, "rules": []}
            for group, name in zip(spec.security_groups, spec.security_group_names or spec.security_groups, strict=True)
        ]
        return json_answer({"security_groups": groups})

    async def password(self, request: Request) -> Answer:
        """Nothing in a guest posts an encrypted password here, so there is none."""
        await self._server(request)
        return json_answer({"password": ""})

    async def no_password(self, request: Request) -> Answer:
        await self._server(request)
        return empty_answer(204)

    async def topology(self, request: Request) -> Answer:
        """No guest has a NUMA topology of its own."""
        await self._server(request)
        return json_answer({"nodes": [], "pagesize_kb": None})


def _plain(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"version": entry["version"], "addr": entry["addr"]} for entry in entries]


def interface_view(instance: Instance, port: InstancePort, version: int) -> dict[str, Any]:
    """One interface, as `os-interface` shows it."""
    definition = port.definition
    view: dict[str, Any] = {
        "port_id": definition.id,
        "net_id": definition.network.id,
        "mac_addr": definition.mac_address,
        "port_state": "ACTIVE" if instance.power_state is PowerState.RUNNING else "DOWN",
        "fixed_ips": [{"subnet_id": ip.subnet_id, "ip_address": ip.ip_address} for ip in definition.fixed_ips],
    }
    if version >= PORT_TAG_SINCE:
        view["tag"] = port.tag
    return view
