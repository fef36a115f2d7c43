"""What a body about a server names: flavor, image, key pair, host, zone. Looked up as the caller may see them, or refused.

Called by create, rebuild, resize, rescue and the moves. Who names what is not there gets 400 with the field's value.
"""

from __future__ import annotations

import secrets
import string
import uuid

from instar.api.resource import Compute
from instar.errors import BadRequest, NotFound, UnknownReference
from instar.http.context import RequestContext
from instar.images.contract import Image
from instar.model.instance import Flavor, SpecImage
from instar.store.aggregates import zone_list
from instar.store.flavors import flavor_fetch
from instar.store.key_pairs import key_pair_fetch

PASSWORD_LENGTH = 12


async def flavor_named(compute: Compute, context: RequestContext, reference: str | int) -> Flavor:
    """By its id, or a URL that ends in it. Raises UnknownReference."""
    flavor_id = str(reference).rstrip("/").rpartition("/")[2]
    visible_to = None if context.is_admin else context.project_id
    try:
        flavor = await flavor_fetch(compute.store, flavor_id, visible_to=visible_to)
    except NotFound as error:
        raise UnknownReference(kind="Flavor", name=flavor_id[:80]) from error
    if flavor.disabled:
        raise UnknownReference(kind="Flavor", name=flavor_id[:80])
    return flavor


def image_id_of(reference: str, field: str) -> str:
    """The id in an image's reference, which may be a URL. Raises UnknownReference for what is none."""
    image_id = reference.rstrip("/").rpartition("/")[2]
    try:
        return str(uuid.UUID(image_id))
    except ValueError as error:
        raise UnknownReference(f"Invalid {field} provided: {image_id[:80]!r} is not an image's id.") from error


async def image_named(compute: Compute, context: RequestContext, image_id: str) -> Image:
    """Raises UnknownReference for one that the caller may not see, too."""
    try:
        return await compute.images.image_fetch(image_id, project_id=context.project_id, is_admin=context.is_admin)
    except NotFound as error:
        raise UnknownReference(kind="Image", name=image_id[:80]) from error


def spec_image(image: Image) -> SpecImage:
    """The image as an instance remembers it."""
    return SpecImage(
        id=image.id,
        name=image.name,
        min_disk_gib=image.min_disk_gib,
        min_ram_mib=image.min_ram_mib,
        virtual_size_bytes=image.virtual_size_bytes,
        properties=image.properties,
    )


async def public_key_named(compute: Compute, user_id: str, name: str | None) -> str | None:
    """Of a user's key pair; None where none is named. Raises UnknownReference."""
    if not name:
        return None
    try:
        return (await key_pair_fetch(compute.store, user_id, name)).public_key
    except NotFound as error:
        raise UnknownReference(f"Invalid key_name provided: key pair {name!r} could not be found.") from error


async def known_host(compute: Compute, host: str | None, hypervisor_hostname: str | None = None) -> str:
    """A compute host by its name, or by what its hypervisor calls itself; both must agree when both are given."""
    for seen in (await compute.hosts.seen(fresh=True)).values():
        names = (seen.name, seen.hypervisor_hostname)
        if (host is None or host in names) and (hypervisor_hostname in (None, seen.hypervisor_hostname)):
            return seen.name
    raise UnknownReference(kind="Compute host", name=(host or hypervisor_hostname or "")[:80])


async def check_zone(compute: Compute, zone: str) -> None:
    """Raises BadRequest for a zone that there is not."""
    if zone not in await zone_list(compute.store):
        raise BadRequest(f"The requested availability zone {zone[:80]!r} is not available.")


def new_password() -> str:
    """For who gave none: what an answer says of a guest's administrator."""
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(PASSWORD_LENGTH))
