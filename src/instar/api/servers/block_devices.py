"""What a new server is booted from, and the volumes that it has: the body's block devices, held against what there is.

Called by `create.py`. Raises 400 that names the block device and its value.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from instar.api.resource import Compute
from instar.api.servers.block_device_entries import Entry, entries_of, image_entries_of
from instar.api.servers.bodies import NewServer
from instar.api.servers.checks import GIB, check_image_fits, given
from instar.api.servers.references import image_id_of, image_named, spec_image
from instar.errors import BadRequest, Conflict, ImageUnusable, NotFound
from instar.http.context import RequestContext
from instar.images.contract import Image
from instar.lifecycle.device_names import PREFIXES, free_device, local_devices, volume_bus, wanted_device
from instar.model.instance import Flavor, InstanceSpec, RequestedVolume, SpecImage

MULTIATTACH_SINCE = 60
_NO_PROPERTY = frozenset(
    {"image_id", "image_name", "disk_format", "container_format", "min_disk", "min_ram", "size", "checksum"}
)


class BootSource(NamedTuple):
    """`image` has no id where a volume is booted; then it is what that volume knows of its image."""

    image: SpecImage
    volumes: tuple[RequestedVolume, ...] = ()
    ephemeral_gib: int | None = None
    swap_mib: int | None = None


class _Source(NamedTuple):
    """A volume to be, and what its source is like."""

    volume: RequestedVolume
    image: SpecImage


async def boot_source(
    compute: Compute, context: RequestContext, server: NewServer, flavor: Flavor, *, version: int, count: int
) -> BootSource:
    reference = given(server.image_ref, "")
    image = await image_named(compute, context, image_id_of(reference, "imageRef")) if reference else None
    entries = entries_of(server, image.id if image else None, image_entries_of(image.properties) if image else ())
    if count > 1 and any(entry.source == "volume" for entry in entries):
        raise BadRequest("Cannot attach one or more volumes to multiple instances")
    root: SpecImage | None = None
    volumes = []
    for entry in entries:
        if entry.is_root_image:
            local = image if image and image.id == entry.id else await _image(compute, context, entry)
            check_image_fits(local, flavor, is_admin=context.is_admin)
            root = spec_image(local)
        elif entry.destination == "volume":
            found = await _source(compute, context, entry, version)
            volumes.append(found.volume)
            if entry.boot_index == 0:
                root = found.image
                if flavor.memory_mib < root.min_ram_mib:
                    raise ImageUnusable(
                        f"Flavor's memory is too small for requested image: {flavor.memory_mib} MiB, it needs "
                        f"{root.min_ram_mib}."
                    )
    assert root is not None, "one of them has boot_index 0"
    ephemeral_gib = _local(entries, flavor.ephemeral_gib, swap=False)
    return BootSource(root, tuple(volumes), ephemeral_gib, _local(entries, flavor.swap_mib, swap=True))


def with_devices(spec: InstanceSpec) -> InstanceSpec:
    """Every volume gets its device's name: the one that is booted the first, others what they wished or what is free.

    Raises BadRequest."""
    bus = volume_bus(spec)
    root = next((volume for volume in spec.volumes if volume.boot_index == 0), None)
    taken = local_devices(spec, bus, boots_from_volume=root is not None)
    named: dict[str, str] = {}
    if root is not None:
        named[root.volume_id] = f"{PREFIXES[bus]}a"
        taken.add(named[root.volume_id])
    # Wishes come first: nobody shall get a name by chance that another has asked for.
    for volume in sorted(spec.volumes, key=lambda one: one.device is None):
        if volume.volume_id in named:
            continue
        try:
            name = wanted_device(volume.device, taken, bus) if volume.device else free_device(taken, bus)
        except Conflict as error:
            raise BadRequest(f"Invalid input: server.block_device_mapping_v2: {error.message}") from error
        named[volume.volume_id] = name
        taken.add(name)
    volumes = tuple(replace(volume, device=named[volume.volume_id], bus=bus) for volume in spec.volumes)
    return replace(spec, volumes=volumes)


def with_own_volumes(spec: InstanceSpec) -> InstanceSpec:
    """The same for one more server: its new volumes are others."""
    volumes = tuple(
        replace(volume, volume_id=str(uuid.uuid4()), attachment_id=str(uuid.uuid4())) for volume in spec.volumes
    )
    return replace(spec, volumes=volumes)


async def _source(compute: Compute, context: RequestContext, entry: Entry, version: int) -> _Source:
    if entry.source == "volume":
        return await _of_volume(compute, context, entry, version)
    new = RequestedVolume(
        volume_id=str(uuid.uuid4()), attachment_id=str(uuid.uuid4()), boot_index=entry.boot_index,
        delete_on_termination=entry.ends, create=True, size_gib=entry.size_gib or 0, volume_type=entry.volume_type,
        device=entry.device, tag=entry.tag,
    )  # fmt: skip
    if entry.source == "image":
        image = await _image(compute, context, entry)
        _check_size(entry, max(image.min_disk_gib, -(-image.virtual_size_bytes // GIB)))
        known = replace(spec_image(image), id="", min_disk_gib=0, virtual_size_bytes=0)
        return _Source(replace(new, image_id=image.id), known)
    if entry.source == "snapshot":
        assert entry.id is not None
        try:
            snapshot = await compute.volumes.snapshot_fetch(
                entry.id, project_id=context.project_id, is_admin=context.is_admin
            )
        except NotFound as error:
            raise BadRequest(f"Block Device Mapping is Invalid: failed to get snapshot {entry.id}.") from error
        if snapshot.status != "available":
            raise BadRequest(f"Block Device Mapping is Invalid: snapshot {entry.id} is {snapshot.status}, not available.")
        _check_bootable(entry, snapshot.bootable)
        _check_size(entry, snapshot.size_gib)
        wanted = replace(new, snapshot_id=snapshot.id, size_gib=entry.size_gib or snapshot.size_gib)
        return _Source(wanted, _known_image(snapshot.image_metadata))
    return _Source(new, _known_image({}))


async def _of_volume(compute: Compute, context: RequestContext, entry: Entry, version: int) -> _Source:
    assert entry.id is not None
    try:
        info = await compute.volumes.volume_fetch(entry.id, project_id=context.project_id, is_admin=context.is_admin)
    except NotFound as error:
        raise BadRequest(f"Block Device Mapping is Invalid: failed to get volume {entry.id}.") from error
    if info.multiattach and version < MULTIATTACH_SINCE:
        raise BadRequest(f"Volume {info.id} has multiattach enabled: this needs microversion 2.60.")
    if info.status != "available" and not (info.multiattach and info.status == "in-use"):
        raise BadRequest(f"Invalid volume: volume {info.id} status must be available, but it is {info.status}.")
    _check_bootable(entry, info.bootable)
    if entry.size_gib is not None and entry.size_gib != info.size_gib:
        raise BadRequest(f"Invalid input: {entry.where}.volume_size: volume {info.id} has {info.size_gib} GiB.")
    volume = RequestedVolume(
        volume_id=info.id, attachment_id=str(uuid.uuid4()), boot_index=entry.boot_index,
        delete_on_termination=entry.ends, size_gib=info.size_gib, device=entry.device, tag=entry.tag,
    )  # fmt: skip
    return _Source(volume, _known_image(info.image_metadata))


async def _image(compute: Compute, context: RequestContext, entry: Entry) -> Image:
    assert entry.id is not None
    image = await image_named(compute, context, entry.id)
    if image.status != "active":
        raise ImageUnusable(f"Image {image.id} is not active.")
    return image


def _known_image(metadata: dict[str, str]) -> SpecImage:
    """What a volume remembers of its image, as that of an instance that has none."""
    properties = {name: value for name, value in metadata.items() if name not in _NO_PROPERTY}
    ram = metadata.get("min_ram", "")
    return SpecImage(
        id="", name="", min_ram_mib=int(ram) if ram.isascii() and ram.isdigit() else 0, properties=properties
    )


def _check_bootable(entry: Entry, bootable: bool) -> None:
    if entry.boot_index == 0 and not bootable:
        raise BadRequest(f"Block Device {entry.id} is not bootable.")


def _check_size(entry: Entry, least_gib: int) -> None:
    if entry.size_gib is not None and entry.size_gib < least_gib:
        raise BadRequest(
            f"Invalid input: {entry.where}.volume_size: {entry.size_gib} GiB is smaller than the {least_gib} GiB that "
            f"{entry.source} {entry.id} needs."
        )


def _local(entries: Sequence[Entry], limit: int, *, swap: bool) -> int | None:
    """The size of the swap disk (MiB) or the ephemeral one (GiB) that is asked for; None: that of the flavor."""
    wanted = [
        entry for entry in entries
        if (entry.source, entry.destination) == ("blank", "local") and (entry.guest_format == "swap") is swap
    ]  # fmt: skip
    if not wanted:
        return None
    kind = "swap" if swap else "ephemeral"
    if len(wanted) > 1:
        raise BadRequest(f"Block Device Mapping is Invalid: {wanted[1].where}: more than one {kind} disk is requested.")
    size = wanted[0].size_gib if wanted[0].size_gib is not None else limit
    if size > limit or not limit:
        unit = "MiB" if swap else "GiB"
        raise BadRequest(
            f"Invalid input: {wanted[0].where}.volume_size: the flavor has {limit} {unit} of {kind} disk, not {size}."
        )
    return size
