"""Checks and conversions of what a new server's body says, each of one thing, without any service.

`create.py` calls them in the order in which a request is checked.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import uuid
from typing import Any

from msgspec import UnsetType

from instar.api.body import convert
from instar.api.servers.bodies import (
    CreateBackup,
    CreateImage,
    CreateServer,
    Hints,
    NewServer,
    Rebuild,
    RequestedNic,
)
from instar.errors import BadRequest, Forbidden, ImageUnusable, QuotaExceeded
from instar.images.contract import Image
from instar.model.instance import Flavor, SpecImage
from instar.model.network import RequestedNetwork

USER_DATA_MAX_BYTES = 65_535  # of the encoded text, as the API has always counted
GIB = 1 << 30
SERVERS_MAX = 1000  # of one request, whatever the quota


def given(value: Any, otherwise: Any) -> Any:
    """The value, or `otherwise` where the body does not have it."""
    return otherwise if isinstance(value, UnsetType) else value


def counts(server: NewServer) -> tuple[int, int]:
    """(fewest, most) servers that are asked for. Raises BadRequest."""
    least = given(server.min_count, 1)
    most = given(server.max_count, least)
    if least > most:
        raise BadRequest("min_count must be <= max_count")
    if most > SERVERS_MAX:
        raise BadRequest(f"Invalid input: server.max_count: {most} is greater than {SERVERS_MAX}.")
    return least, most


def read_hints(body: CreateServer) -> dict[str, Any]:
    """The scheduler hints, under either of their names. Raises BadRequest."""
    hints: dict[str, Any] = given(body.hints, None) or given(body.old_hints, {}) or {}
    for name in ("same_host", "different_host"):
        if isinstance(hints.get(name), str):
            hints[name] = [hints[name]]
    convert(hints, Hints, 1)
    if len(hints) > 50:
        raise BadRequest("Invalid input: os:scheduler_hints: more than 50 hints.")
    return hints


def check_image_fits(image: Image | SpecImage, flavor: Flavor, *, is_admin: bool) -> None:
    """Raises ImageUnusable where the image is not ready or the flavor is too small for it; Forbidden for users who want
    a flavor without a root disk (its disk would have the image's size, which nobody has counted)."""
    if isinstance(image, Image) and image.status != "active":
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


def read_metadata(server: NewServer | CreateImage | CreateBackup, limits: dict[str, int]) -> dict[str, str]:
    """Raises QuotaExceeded."""
    metadata: dict[str, str] = given(server.metadata, {})
    check_metadata_count(len(metadata), limits)
    return metadata


def check_metadata_count(count: int, limits: dict[str, int]) -> None:
    """Raises QuotaExceeded where a server would have more metadata items than its project may give it."""
    limit = limits["metadata_items"]
    if 0 <= limit < count:
        raise QuotaExceeded(resource="metadata_items", requested=count, used=0, limit=limit)


def read_description(server: NewServer, version: int) -> str | None:
    """What the server is described by."""
    # Before descriptions could be given, a server was described by its name.
    description: str | None = given(server.description, None) if version >= 19 else server.name
    return description


def read_user_data(server: NewServer | Rebuild, where: str = "server") -> bytes | None:
    """The decoded user data. Raises BadRequest for what is too long or not base64."""
    text = given(server.user_data, None)
    if text is None:
        return None
    if len(text) > USER_DATA_MAX_BYTES:
        raise BadRequest(f"Invalid input: {where}.user_data: longer than {USER_DATA_MAX_BYTES} bytes.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"Invalid input: {where}.user_data: is not base64.") from error


def read_personality(
    server: NewServer | Rebuild, limits: dict[str, int], within: str = "server"
) -> dict[str, bytes]:
    """Files to be injected, decoded: path → content. Raises BadRequest, QuotaExceeded."""
    files = given(server.personality, [])
    limit = limits["injected_files"]
    if 0 <= limit < len(files):
        raise QuotaExceeded(resource="injected_files", requested=len(files), used=0, limit=limit)
    found: dict[str, bytes] = {}
    for index, file in enumerate(files):
        where = f"{within}.personality[{index}]"
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


def read_certificates(server: NewServer | Rebuild, where: str = "server") -> tuple[str, ...] | None:
    """Raises BadRequest for one that is named twice."""
    certificates = given(server.trusted_image_certificates, None)
    if certificates is None:
        return None
    if len(set(certificates)) != len(certificates):
        raise BadRequest(f"Invalid input: {where}.trusted_image_certificates: has non-unique elements.")
    return tuple(certificates)


def check_address(name: str, text: str | None, family: int, where: str = "server") -> str:
    """An IP address in its normal form; empty stays empty. Raises BadRequest."""
    if not text:
        return ""
    try:
        address = ipaddress.IPv4Address(text) if family == 4 else ipaddress.IPv6Address(text)
    except ValueError as error:
        raise BadRequest(f"Invalid input: {where}.{name}: {text[:64]!r} is not an IPv{family} address.") from error
    return str(address)


def read_nic(index: int, nic: RequestedNic) -> RequestedNetwork:
    """One NIC as the network service is asked for it. Raises BadRequest that names the element."""
    where = f"Invalid input: server.networks[{index}]"
    network, port, fixed_ip = given(nic.uuid, None), given(nic.port, None), given(nic.fixed_ip, None)
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
        tag=given(nic.tag, None),
    )


def _canonical(text: str | None) -> str | None:
    return str(uuid.UUID(text)) if text else None


def refuse_twice(requested: tuple[RequestedNetwork, ...]) -> None:
    """Raises BadRequest for a port or a tag that is there twice."""
    ports = [nic.port_id for nic in requested if nic.port_id]
    if len(set(ports)) != len(ports):
        raise BadRequest("Invalid input: server.networks: a port is named twice.")
    tags = [nic.tag for nic in requested if nic.tag]
    if len(set(tags)) != len(tags):
        raise BadRequest("Invalid input: server.networks: a tag is used twice.")
