"""`POST /servers`: every check that can be made before a build is accepted (LIFECYCLE section 5), then one call.

Read top to bottom as the request goes: body, sizes, image, key, groups, networks, zone and host, and the door.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import secrets
import string
import uuid
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from instar.api.body import convert
from instar.api.resource import ApiRoute, Compute, links, read_body, service_url
from instar.api.servers.bodies import BlockDevice, CreateServer, Hints, NewServer, RequestedNic
from instar.api.servers.naming import check_hostname, default_hostname, numbered
from instar.errors import BadRequest, Forbidden, ImageUnusable, NotFound, QuotaExceeded, UnknownReference
from instar.http.answer import Answer, json_answer
from instar.http.context import RequestContext
from instar.http.policy import own_project
from instar.http.request import Request
from instar.images.contract import Image
from instar.lifecycle.door import NewInstance
from instar.model.instance import Flavor, InstanceSpec, SpecImage
from instar.model.network import RequestedNetwork
from instar.store.aggregates import zone_list
from instar.store.flavors import flavor_fetch
from instar.store.key_pairs import key_pair_fetch
from instar.store.quotas import quota_limits
from instar.store.server_groups import server_group_fetch

USER_DATA_MAX_BYTES = 65_535  # of the encoded text, as the API has always counted
GIB = 1 << 30
PASSWORD_LENGTH = 12
NETWORKS_REQUIRED_SINCE = 37
SERVERS_MAX = 1000  # of one request, whatever the quota


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
        least, most = _counts(server)
        limits = await quota_limits(self._compute.store, self._compute.settings.quota, context.project_id)
        hints = _hints(body)
        flavor = await self._flavor(server, context)
        image = await self._image(server, context, flavor)
        key_public = await self._public_key(server, context)
        group_id = await self._group(hints, context, least, limits)
        placement = await self._placement(server, context)
        groups = await self._security_groups(server, context)
        networks = await self._networks(server, request, most)
        spec = InstanceSpec(
            flavor=flavor,
            image=image,
            networks=networks,
            security_groups=groups,
            metadata=_metadata(server, limits),
            tags=tuple(dict.fromkeys(_given(server.tags, []))),
            description=_description(server, request.microversion),
            key_name=_given(server.key_name, None) or None,
            key_public=key_public,
            user_data=_user_data(server),
            config_drive=server.config_drive is not False,  # where nobody says, it has one
            availability_zone=placement.zone,
            requested_host=placement.host,
            group_id=group_id,
            hints=hints,
            disk_config=_given(server.disk_config, "AUTO"),
            personality=_personality(server, limits),
            trusted_image_certificates=_certificates(server),
            access_ip_v4=check_address("accessIPv4", _given(server.access_ip_v4, ""), 4),
            access_ip_v6=check_address("accessIPv6", _given(server.access_ip_v6, ""), 6),
        )
        return await self._accept(request, server, spec, least, most)

    async def _accept(self, request: Request, server: NewServer, spec: InstanceSpec, least: int, most: int) -> Answer:
        """As many servers as asked for; where the quota has no room for all, fewer, but never less than `least`."""
        hostname = _given(server.hostname, None)
        if hostname is not None:
            if most > 1:
                raise BadRequest("Unable to allocate a single hostname to multiple instances")
            check_hostname(hostname, request.microversion)
        count = most
        while True:
            try:
                made = await self._compute.lifecycle.create(
                    request.context, _drafts(server.name, hostname, spec, count, most)
                )
                break
            except QuotaExceeded as error:
                fewer = _that_fit(error, spec.flavor, count)
                if fewer < least:
                    raise
                count = fewer
        if _given(server.return_reservation_id, False):
            return json_answer({"reservation_id": made[0].reservation_id}, 202)
        first = made[0]
        view: dict[str, Any] = {
            "id": first.id,
            "links": links(request, "servers", first.id),
            "OS-DCF:diskConfig": spec.disk_config,
            "security_groups": [{"name": name} for name in spec.security_groups],
            "adminPass": _given(server.admin_pass, None) or _password(),
        }
        location = f"{service_url(request)}/servers/{first.id}".encode()
        return json_answer({"server": view}, 202, [(b"location", location)])

    # --- what the body names ----------------------------------------------------------------------------------------

    async def _flavor(self, server: NewServer, context: RequestContext) -> Flavor:
        flavor_id = str(server.flavor_ref).rstrip("/").rpartition("/")[2]
        visible_to = None if context.is_admin else context.project_id
        try:
            flavor = await flavor_fetch(self._compute.store, flavor_id, visible_to=visible_to)
        except NotFound as error:
            raise UnknownReference(kind="Flavor", name=flavor_id[:80]) from error
        if flavor.disabled:
            raise UnknownReference(kind="Flavor", name=flavor_id[:80])
        return flavor

    async def _image(self, server: NewServer, context: RequestContext, flavor: Flavor) -> SpecImage:
        image_id = image_reference(server)
        try:
            image = await self._compute.images.image_fetch(
                image_id, project_id=context.project_id, is_admin=context.is_admin
            )
        except NotFound as error:
            raise UnknownReference(kind="Image", name=image_id[:80]) from error
        check_image_fits(image, flavor, is_admin=context.is_admin)
        return SpecImage(
            id=image.id,
            name=image.name,
            min_disk_gib=image.min_disk_gib,
            min_ram_mib=image.min_ram_mib,
            virtual_size_bytes=image.virtual_size_bytes,
            properties=image.properties,
        )

    async def _public_key(self, server: NewServer, context: RequestContext) -> str | None:
        name = _given(server.key_name, None)
        if not name:
            return None
        try:
            return (await key_pair_fetch(self._compute.store, context.user_id, name)).public_key
        except NotFound as error:
            raise UnknownReference(f"Invalid key_name provided: key pair {name!r} could not be found.") from error

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

    async def _security_groups(self, server: NewServer, context: RequestContext) -> tuple[str, ...]:
        names = tuple(
            dict.fromkeys(group.name for group in _given(server.security_groups, []) if group.name is not UNSET)
        ) or ("default",)  # fmt: skip
        await self._compute.networks.security_groups_exist(names, project_id=context.project_id)
        return names

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
            requested = tuple(_nic(index, nic) for index, nic in enumerate(asked))
            if count > 1 and any(nic.port_id or nic.fixed_ip for nic in requested):
                raise BadRequest("A port or a fixed IP address cannot be requested for more than one server.")
            _refuse_twice(requested)
        context = request.context
        return await self._compute.networks.resolve(
            requested, project_id=context.project_id, is_admin=context.is_admin, count=count
        )

    async def _placement(self, server: NewServer, context: RequestContext) -> Placement:
        zone = _given(server.availability_zone, None)
        host = None
        if zone is not None and ":" in zone:
            zone, host, node = [*zone.split(":", 2), "", ""][:3]
            host = host or node or None
            if host and not context.is_admin:
                raise Forbidden(action="os_compute_api:servers:create:forced_host")
        named = _given(server.host, None) or _given(server.hypervisor_hostname, None)
        if named:
            if not context.is_admin:
                raise Forbidden(action="os_compute_api:servers:create:requested_destination")
            if host is not None:
                raise BadRequest("Bad input: a host is named both in availability_zone and by itself.")
            host = await self._known_host(_given(server.host, None), _given(server.hypervisor_hostname, None))
        elif host is not None:
            host = await self._known_host(host, None)
        if zone and zone not in await zone_list(self._compute.store):
            raise BadRequest(f"The requested availability zone {zone[:80]!r} is not available.")
        return Placement(zone or None, host)

    async def _known_host(self, host: str | None, hypervisor_hostname: str | None) -> str:
        """A compute host by its name, or by what its hypervisor calls itself; both must agree when both are given."""
        for seen in (await self._compute.hosts.seen()).values():
            names = (seen.name, seen.hypervisor_hostname)
            if (host is None or host in names) and (hypervisor_hostname in (None, seen.hypervisor_hostname)):
                return seen.name
        raise UnknownReference(kind="Compute host", name=(host or hypervisor_hostname or "")[:80])


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if isinstance(value, UnsetType) else value


def _counts(server: NewServer) -> tuple[int, int]:
    least = _given(server.min_count, 1)
    most = _given(server.max_count, least)
    if least > most:
        raise BadRequest("min_count must be <= max_count")
    if most > SERVERS_MAX:
        raise BadRequest(f"Invalid input: server.max_count: {most} is greater than {SERVERS_MAX}.")
    return least, most


def _hints(body: CreateServer) -> dict[str, Any]:
    hints: dict[str, Any] = _given(body.hints, None) or _given(body.old_hints, {}) or {}
    for name in ("same_host", "different_host"):
        if isinstance(hints.get(name), str):
            hints[name] = [hints[name]]
    convert(hints, Hints, 1)
    if len(hints) > 50:
        raise BadRequest("Invalid input: os:scheduler_hints: more than 50 hints.")
    return hints


def image_reference(server: NewServer) -> str:
    """The image to boot from: `imageRef`, or the one block device that is supported. Raises BadRequest."""
    if server.block_device_mapping is not UNSET:
        raise BadRequest("Invalid input: server.block_device_mapping: booting from volumes is not supported.")
    image_id = _given(server.image_ref, "").rstrip("/").rpartition("/")[2]
    for index, device in enumerate(_given(server.block_device_mapping_v2, [])):
        image_id = _boot_image(index, device, image_id)
    if not image_id:
        raise BadRequest("Invalid input: server.imageRef: an image is needed, volumes are not supported.")
    try:
        return str(uuid.UUID(image_id))
    except ValueError as error:
        raise UnknownReference(f"Invalid imageRef provided: {image_id[:80]!r} is not an image's id.") from error


def _boot_image(index: int, device: BlockDevice, image_id: str) -> str:
    """The image of a block device that is the local root disk; whatever else one can describe is refused by its name."""
    where = f"Invalid input: server.block_device_mapping_v2[{index}]"
    if index:
        raise BadRequest(f"{where}: only the root disk is supported.")
    if device.source_type not in ("image", UNSET):
        raise BadRequest(f"{where}.source_type: {device.source_type!r} is not supported, only 'image' is.")
    if device.destination_type not in ("local", UNSET):
        raise BadRequest(f"{where}.destination_type: {device.destination_type!r} is not supported, only 'local' is.")
    if str(device.boot_index) != "0":
        raise BadRequest(f"{where}.boot_index: must be 0, only the root disk is supported.")
    found = _given(device.uuid, None)
    if not found:
        raise BadRequest(f"{where}.uuid: the image's id is needed.")
    if image_id and image_id != found:
        raise BadRequest(f"{where}.uuid: is not the image of imageRef.")
    if device.volume_size is not None:
        raise BadRequest(f"{where}.volume_size: the root disk has the size of the flavor.")
    return str(found)


def check_image_fits(image: Image, flavor: Flavor, *, is_admin: bool) -> None:
    """Raises ImageUnusable where the image is not ready or the flavor is too small for it; Forbidden for users who want
    a flavor without a root disk (its disk would have the image's size, which nobody has counted)."""
    if image.status != "active":
        raise ImageUnusable(f"Image {image.id} is not active.")
    if flavor.memory_mib < image.min_ram_mib:
        raise ImageUnusable(
            f"Flavor's memory is too small for requested image: {flavor.memory_mib} MiB, it needs {image.min_ram_mib}."
        )
    if flavor.root_gib == 0:
        if not is_admin:
            raise Forbidden(action="os_compute_api:servers:create:zero_disk_flavor")
        return
    if flavor.root_gib < image.min_disk_gib:
        raise ImageUnusable(
            f"Flavor's disk is too small for requested image: {flavor.root_gib} GiB, it needs {image.min_disk_gib}."
        )
    if flavor.root_gib * GIB < image.virtual_size_bytes:
        needed = -(-image.virtual_size_bytes // GIB)
        raise ImageUnusable(
            f"Flavor's disk is too small for requested image: {flavor.root_gib} GiB, its disk has {needed} GiB."
        )


def _metadata(server: NewServer, limits: dict[str, int]) -> dict[str, str]:
    metadata: dict[str, str] = _given(server.metadata, {})
    check_metadata_count(len(metadata), limits)
    return metadata


def check_metadata_count(count: int, limits: dict[str, int]) -> None:
    """Raises QuotaExceeded where a server would have more metadata items than its project may give it."""
    limit = limits["metadata_items"]
    if 0 <= limit < count:
        raise QuotaExceeded(resource="metadata_items", requested=count, used=0, limit=limit)


def _description(server: NewServer, version: int) -> str | None:
    # Before descriptions could be given, a server was described by its name.
    description: str | None = _given(server.description, None) if version >= 19 else server.name
    return description


def _user_data(server: NewServer) -> bytes | None:
    text = _given(server.user_data, None)
    if text is None:
        return None
    if len(text) > USER_DATA_MAX_BYTES:
        raise BadRequest(f"Invalid input: server.user_data: longer than {USER_DATA_MAX_BYTES} bytes.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("Invalid input: server.user_data: is not base64.") from error


def _personality(server: NewServer, limits: dict[str, int]) -> dict[str, bytes]:
    files = _given(server.personality, [])
    limit = limits["injected_files"]
    if 0 <= limit < len(files):
        raise QuotaExceeded(resource="injected_files", requested=len(files), used=0, limit=limit)
    found: dict[str, bytes] = {}
    for index, file in enumerate(files):
        where = f"server.personality[{index}]"
        if 0 <= limits["injected_file_path_bytes"] < len(file.path.encode()):
            raise QuotaExceeded(
                resource="injected_file_path_bytes", requested=len(file.path.encode()), used=0,
                limit=limits["injected_file_path_bytes"],
            )  # fmt: skip
        try:
            contents = base64.b64decode(file.contents, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"Invalid input: {where}.contents: is not base64.") from error
        if 0 <= limits["injected_file_content_bytes"] < len(contents):
            raise QuotaExceeded(
                resource="injected_file_content_bytes", requested=len(contents), used=0,
                limit=limits["injected_file_content_bytes"],
            )  # fmt: skip
        found[file.path] = contents
    return found


def _certificates(server: NewServer) -> tuple[str, ...] | None:
    certificates = _given(server.trusted_image_certificates, None)
    if certificates is None:
        return None
    if len(set(certificates)) != len(certificates):
        raise BadRequest("Invalid input: server.trusted_image_certificates: has non-unique elements.")
    return tuple(certificates)


def check_address(name: str, text: str | None, family: int) -> str:
    """An IP address in its normal form; empty stays empty. Raises BadRequest."""
    if not text:
        return ""
    try:
        address = ipaddress.IPv4Address(text) if family == 4 else ipaddress.IPv6Address(text)
    except ValueError as error:
        raise BadRequest(f"Invalid input: server.{name}: {text[:64]!r} is not an IPv{family} address.") from error
    return str(address)


def _nic(index: int, nic: RequestedNic) -> RequestedNetwork:
    where = f"Invalid input: server.networks[{index}]"
    network, port, fixed_ip = _given(nic.uuid, None), _given(nic.port, None), _given(nic.fixed_ip, None)
    if port is None and network is None:
        raise BadRequest(f"{where}: a network's uuid or a port is needed.")
    if fixed_ip is not None:
        if port is not None:
            raise BadRequest(f"{where}: a fixed IP address cannot be given for a port that exists.")
        try:
            fixed_ip = str(ipaddress.ip_address(fixed_ip))
        except ValueError as error:
            raise BadRequest(f"{where}.fixed_ip: {fixed_ip[:64]!r} is not an IP address.") from error
    return RequestedNetwork(
        # A port knows its network better than whoever names both.
        network_id=_canonical(network) if port is None else None,
        port_id=_canonical(port),
        fixed_ip=fixed_ip,
        tag=_given(nic.tag, None),
    )


def _canonical(text: str | None) -> str | None:
    return str(uuid.UUID(text)) if text else None


def _refuse_twice(requested: tuple[RequestedNetwork, ...]) -> None:
    ports = [nic.port_id for nic in requested if nic.port_id]
    if len(set(ports)) != len(ports):
        raise BadRequest("Invalid input: server.networks: a port is named twice.")
    tags = [nic.tag for nic in requested if nic.tag]
    if len(set(tags)) != len(tags):
        raise BadRequest("Invalid input: server.networks: a tag is used twice.")


def _drafts(name: str, hostname: str | None, spec: InstanceSpec, count: int, most: int) -> list[NewInstance]:
    drafts = []
    for index in range(count):
        instance_id = str(uuid.uuid4())
        own_name = numbered(name, index, most)
        own_spec = spec if index == 0 else msgspec.structs.replace(spec, launch_index=index)
        drafts.append(NewInstance(own_name, hostname or default_hostname(own_name, instance_id), own_spec, instance_id))
    return drafts


def _that_fit(error: QuotaExceeded, flavor: Flavor, count: int) -> int:
    """How many servers the refused resource has room for; always fewer than were tried."""
    size = {"instances": 1, "cores": flavor.vcpus, "ram": flavor.memory_mib}.get(error.resource, 0)
    if not size:
        return 0
    return max(0, min(count - 1, (int(error.limit) - int(error.used)) // size))


def _password() -> str:
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(PASSWORD_LENGTH))
