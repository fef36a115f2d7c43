"""`POST /servers`: every check that can be made before a build is accepted (LIFECYCLE section 5), then one call.

Read top to bottom as the request goes: body, sizes, image, key, groups, networks, zone and host, and the door.
"""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from instar.api.resource import ApiRoute, Compute, links, read_body, service_url
from instar.api.servers.block_devices import boot_source, with_devices, with_own_volumes
from instar.api.servers.bodies import CreateServer, NewServer
from instar.api.servers.checks import (
    check_address,
    counts,
    given,
    read_certificates,
    read_description,
    read_hints,
    read_metadata,
    read_nic,
    read_personality,
    read_user_data,
    refuse_twice,
)
from instar.api.servers.naming import check_hostname, default_hostname, numbered
from instar.api.servers.references import (
    check_zone,
    flavor_named,
    known_host,
    new_password,
    public_key_named,
)
from instar.errors import BadRequest, Forbidden, NotFound, QuotaExceeded, UnknownReference
from instar.http.answer import Answer, json_answer
from instar.http.context import RequestContext
from instar.http.policy import own_project
from instar.http.request import Request
from instar.lifecycle.new_records import NewInstance
from instar.model.instance import Flavor, InstanceSpec
from instar.model.network import RequestedNetwork
from instar.store.quotas import quota_limits
from instar.store.server_groups import server_group_fetch

NETWORKS_REQUIRED_SINCE = 37


class Placement(NamedTuple):
    """Where the user wants the servers: a zone, and for admins a host."""

    zone: str | None
    host: str | None


class ServerCreation:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        return [ApiRoute("POST", "/servers", "os_compute_api:servers:create", self.create)]

    async def create(self, request: Request) -> Answer:
        body = await read_body(request, CreateServer)
        server, context = body.server, request.context
        least, most = counts(server)
        limits = await quota_limits(self._compute.store, self._compute.settings.quota, context.project_id)
        hints = read_hints(body)
        flavor = await flavor_named(self._compute, context, server.flavor_ref)
        boot = await boot_source(
            self._compute, context, server, flavor, version=request.microversion, count=most
        )
        key_public = await public_key_named(self._compute, context.user_id, given(server.key_name, None))
        group_id = await self._group(hints, context, least, limits)
        placement = await self._placement(server, context)
        groups, group_names = await self._security_groups(server, context)
        networks = await self._networks(server, request, most)
        spec = InstanceSpec(
            flavor=flavor,
            image=boot.image,
            networks=networks,
            security_groups=groups,
            security_group_names=group_names,
            metadata=read_metadata(server, limits),
            tags=tuple(dict.fromkeys(given(server.tags, []))),
            description=read_description(server, request.microversion),
            key_name=given(server.key_name, None) or None,
            key_public=key_public,
            user_data=read_user_data(server),
            config_drive=server.config_drive is not False,  # where nobody says, it has one
            availability_zone=placement.zone,
            requested_host=placement.host,
            group_id=group_id,
            hints=hints,
            disk_config=given(server.disk_config, "AUTO"),
            personality=read_personality(server, limits),
            trusted_image_certificates=read_certificates(server),
            volumes=boot.volumes,
            ephemeral_gib=boot.ephemeral_gib,
            swap_mib=boot.swap_mib,
            access_ip_v4=check_address("accessIPv4", given(server.access_ip_v4, ""), 4),
            access_ip_v6=check_address("accessIPv6", given(server.access_ip_v6, ""), 6),
        )
        return await self._accept(request, server, with_devices(spec), least, most, limits)

    async def _accept(
        self, request: Request, server: NewServer, spec: InstanceSpec, least: int, most: int, limits: dict[str, int]
    ) -> Answer:
        """As many servers as asked for; where the quota has no room for all, fewer, but never less than `least`."""
        hostname = given(server.hostname, None)
        if hostname is not None:
            if most > 1:
                raise BadRequest("Unable to allocate a single hostname to multiple instances")
            check_hostname(hostname, request.microversion)
        count = most
        while True:
            try:
                made = await self._compute.lifecycle.create(
                    request.context, _drafts(server.name, hostname, spec, count, most), limits
                )
                break
            except QuotaExceeded as error:
                fewer = _that_fit(error, spec.flavor, count)
                if fewer < least:
                    raise
                count = fewer
        if given(server.return_reservation_id, False):
            return json_answer({"reservation_id": made[0].reservation_id}, 202)
        first = made[0]
        view: dict[str, Any] = {
            "id": first.id,
            "links": links(request, "servers", first.id),
            "OS-DCF:diskConfig": spec.disk_config,
            "security_groups": [{"name": name} for name in spec.security_groups],
            "adminPass": given(server.admin_pass, None) or new_password(),
        }
        location = f"{service_url(request)}/servers/{first.id}".encode()
        return json_answer({"server": view}, 202, [(b"location", location)])

    # --- what the body names ----------------------------------------------------------------------------------------

    async def _group(
        self, hints: dict[str, Any], context: RequestContext, count: int, limits: dict[str, int]
    ) -> str | None:
        group_id = hints.get("group")
        if group_id is None:
            return None
        try:
            group = await server_group_fetch(self._compute.store, group_id)
            own_project(context, group.project_id, "Server group", group_id)
        except NotFound as error:
            raise UnknownReference(kind="Server group", name=group_id) from error
        limit = limits["server_group_members"]
        used = len(group.members)
        if limit >= 0 and used + count > limit:
            raise QuotaExceeded(resource="server_group_members", requested=count, used=used, limit=limit)
        return str(group_id)

    async def _security_groups(self, server: NewServer, context: RequestContext) -> tuple[tuple[str, ...], ...]:
        """As given, and their names."""
        given_groups = tuple(
            dict.fromkeys(group.name for group in given(server.security_groups, []) if group.name is not UNSET)
        ) or ("default",)  # fmt: skip
        return given_groups, await self._compute.networks.security_groups_exist(
            given_groups, project_id=context.project_id
        )

    async def _networks(self, server: NewServer, request: Request, count: int) -> tuple[RequestedNetwork, ...]:
        version, asked = request.microversion, server.networks
        if asked is UNSET and version >= NETWORKS_REQUIRED_SINCE:
            raise BadRequest("Invalid input: server: 'networks' is a required property")
        if isinstance(asked, str) and version < NETWORKS_REQUIRED_SINCE:
            raise BadRequest(f"Invalid input: server.networks: {asked!r} is not a list")
        if asked == "none":
            return ()
        requested = None
        if asked is not UNSET and asked != "auto" and asked:
            assert isinstance(asked, list)
            requested = tuple(read_nic(index, nic) for index, nic in enumerate(asked))
            if count > 1 and any(nic.port_id or nic.fixed_ip for nic in requested):
                raise BadRequest("A port or a fixed IP address cannot be requested for more than one server.")
            refuse_twice(requested)
        context = request.context
        return await self._compute.networks.resolve(
            requested, project_id=context.project_id, is_admin=context.is_admin, count=count
        )

    async def _placement(self, server: NewServer, context: RequestContext) -> Placement:
        zone = given(server.availability_zone, None)
        host = None
        if zone is not None and ":" in zone:
            zone, host, node = [*zone.split(":", 2), "", ""][:3]
            host = host or node or None
            if host and not context.is_admin:
                raise Forbidden(action="os_compute_api:servers:create:forced_host")
        named = given(server.host, None) or given(server.hypervisor_hostname, None)
        if named:
            if not context.is_admin:
                raise Forbidden(action="os_compute_api:servers:create:requested_destination")
            if host is not None:
                raise BadRequest("Bad input: a host is named both in availability_zone and by itself.")
            host = await known_host(self._compute, given(server.host, None), given(server.hypervisor_hostname, None))
        elif host is not None:
            host = await known_host(self._compute, host)
        if zone:
            await check_zone(self._compute, zone)
        elif host is None:
            zone = self._compute.settings.scheduling.default_zone
        return Placement(zone or None, host)


def _drafts(name: str, hostname: str | None, spec: InstanceSpec, count: int, most: int) -> list[NewInstance]:
    drafts = []
    for index in range(count):
        instance_id = str(uuid.uuid4())
        own_name = numbered(name, index, most)
        own_spec = spec if index == 0 else with_own_volumes(msgspec.structs.replace(spec, launch_index=index))
        drafts.append(NewInstance(own_name, hostname or default_hostname(own_name, instance_id), own_spec, instance_id))
    return drafts


def _that_fit(error: QuotaExceeded, flavor: Flavor, count: int) -> int:
    """How many servers the refused resource has room for; always fewer than were tried."""
    size = {"instances": 1, "cores": flavor.vcpus, "ram": flavor.memory_mib}.get(error.resource, 0)
    if not size:
        return 0
    return max(0, min(count - 1, (int(error.limit) - int(error.used)) // size))
