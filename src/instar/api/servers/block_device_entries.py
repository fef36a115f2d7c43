"""Block devices of a new server as a body or an image names them, in either syntax, read into one form and checked by
themselves: what belongs together, what excludes what, who boots. Nothing is looked up here.

Rules: Compute API, "Create server", block_device_mapping_v2; the old block_device_mapping says the same in fewer words.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from instar.api.body import Tag, convert, explain
from instar.api.servers.bodies import BlockDevice, NewServer, Record
from instar.api.servers.checks import given
from instar.errors import BadRequest

ENTRIES_MAX = 26  # names of disks
_BOOT_DEVICE = ("vda", "sda")


class Entry(msgspec.Struct, frozen=True):
    """`where` names it in messages. `size_gib` None: not given (of a swap it is in MiB). `boot_index` None: not booted."""

    where: str
    source: str
    destination: str
    id: str | None = None
    boot_index: int | None = None
    size_gib: int | None = None
    ends: bool = False
    device: str | None = None
    guest_format: str | None = None
    bus: str | None = None
    tag: str | None = None
    volume_type: str | None = None
    absent: bool = False  # it says only that an image's device of this name is not wanted

    @property
    def is_root_image(self) -> bool:
        return (self.source, self.destination, self.boot_index) == ("image", "local", 0)


class OldBlockDevice(Record, frozen=True):
    volume_id: str | UnsetType | None = UNSET
    snapshot_id: str | UnsetType | None = UNSET
    volume_size: int | str | UnsetType | None = UNSET
    delete_on_termination: bool | UnsetType | None = UNSET
    device_name: str | UnsetType | None = UNSET
    no_device: Any = UNSET
    virtual_name: str | UnsetType | None = UNSET
    connection_info: Any = UNSET


class ImageBlockDevice(msgspec.Struct, frozen=True):
    """As an image's property `block_device_mapping` has it; what else stands there does not matter."""

    source_type: str
    destination_type: str = "volume"
    snapshot_id: str | None = None
    volume_id: str | None = None
    image_id: str | None = None
    boot_index: int | None = None
    volume_size: int | None = None
    delete_on_termination: bool | None = None
    device_name: str | None = None
    guest_format: str | None = None
    tag: Tag | None = None


def entries_of(server: NewServer, image_id: str | None, image_entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """All block devices, the image's own among them, with the root: its image, where that is what is booted.

    Raises BadRequest."""
    old, new = server.block_device_mapping, given(server.block_device_mapping_v2, None)
    if old is not UNSET and old is not None and new is not None:
        raise BadRequest(
            "Using different block_device_mapping syntaxes is not allowed in the same request: "
            "block_device_mapping and block_device_mapping_v2."
        )
    asked = _read_old(old, image_id) if old is not UNSET and old is not None else _read_new(new or [])
    if len(asked) > ENTRIES_MAX:
        raise BadRequest(f"Invalid input: server.block_device_mapping_v2: more than {ENTRIES_MAX} block devices.")
    named = {_bare(entry.device) for entry in asked if entry.device}
    wanted = [entry for entry in image_entries if _bare(entry.device) not in named]
    wanted += [entry for entry in asked if not entry.absent]
    if image_id is not None:
        roots = [entry for entry in wanted if entry.is_root_image]
        if any(entry.id != image_id for entry in roots):
            raise BadRequest(f"Invalid input: {roots[0].where}.uuid: {roots[0].id} is not the image of imageRef.")
        if not roots and not any(entry.boot_index == 0 for entry in image_entries):
            wanted.insert(0, Entry("server.imageRef", "image", "local", image_id, 0))
    _check_boot_order(wanted)
    _check_once(wanted)
    return tuple(wanted)


def image_entries_of(properties: dict[str, str]) -> tuple[Entry, ...]:
    """The block devices that an image stands for: that of a server which was booted from a volume. Raises BadRequest."""
    text = properties.get("block_device_mapping")
    if not text or properties.get("bdm_v2", "").lower() != "true":
        return ()
    try:
        found = msgspec.convert(json.loads(text), list[ImageBlockDevice])
    except (ValueError, RecursionError) as error:
        raise BadRequest("Invalid input: server.imageRef: the image's block_device_mapping cannot be read.") from error
    entries = []
    for index, one in enumerate(found[:ENTRIES_MAX]):
        where = f"server.imageRef: block_device_mapping[{index}]"
        source_id = {"snapshot": one.snapshot_id, "volume": one.volume_id, "image": one.image_id}.get(one.source_type)
        entry = Entry(
            where, one.source_type, one.destination_type, source_id, one.boot_index, one.volume_size,
            bool(one.delete_on_termination), one.device_name, one.guest_format, tag=one.tag,
        )  # fmt: skip
        entries.append(_checked(entry))
    return tuple(entries)


def _read_new(devices: Sequence[BlockDevice]) -> list[Entry]:
    entries = []
    for index, device in enumerate(devices):
        where = f"server.block_device_mapping_v2[{index}]"
        if device.no_device is not UNSET and device.no_device not in (None, False, ""):
            entries.append(Entry(where, "blank", "local", device=device.device_name, absent=True))
            continue
        source = given(device.source_type, None)
        if source is None:
            raise BadRequest(f"Invalid input: {where}.source_type: it is needed: volume, image, snapshot or blank.")
        entry = Entry(
            where=where,
            source=source,
            destination=given(device.destination_type, "volume" if source in ("volume", "snapshot") else "local"),
            id=given(device.uuid, None) or None,
            boot_index=_boot_index(device.boot_index, where),
            size_gib=_size(device.volume_size, where),
            ends=bool(given(device.delete_on_termination, False)),
            device=device.device_name or None,
            guest_format=device.guest_format or None,
            bus=device.disk_bus or None,
            tag=given(device.tag, None),
            volume_type=given(device.volume_type, None) or None,
        )
        entries.append(_checked(entry))
    return entries


def _read_old(mapping: Any, image_id: str | None) -> list[Entry]:
    if not isinstance(mapping, list):
        raise BadRequest("Invalid input: server.block_device_mapping: is not a list.")
    entries: list[Entry] = []
    for index, raw in enumerate(mapping):
        where = f"server.block_device_mapping[{index}]"
        if not isinstance(raw, dict):
            raise BadRequest(f"Invalid input: {where}: is not an object.")
        try:
            device = convert(raw, OldBlockDevice, 1)
        except msgspec.ValidationError as error:
            raise BadRequest(f"Invalid input: {where}: {explain(error)}") from error
        name = given(device.device_name, None) or None
        if device.no_device is not UNSET and device.no_device not in (None, False, ""):
            entries.append(Entry(where, "blank", "local", device=name, absent=True))
            continue
        volume_id, snapshot_id = given(device.volume_id, None), given(device.snapshot_id, None)
        if bool(volume_id) == bool(snapshot_id):
            raise BadRequest(f"Invalid input: {where}: either a volume_id or a snapshot_id is needed.")
        first = image_id is None and not any(entry.boot_index == 0 for entry in entries)
        boots = first or (_bare(name) in _BOOT_DEVICE and image_id is None)
        entry = Entry(
            where, "volume" if volume_id else "snapshot", "volume", volume_id or snapshot_id, 0 if boots else None,
            _size(given(device.volume_size, None), where), bool(given(device.delete_on_termination, False)), name,
        )  # fmt: skip
        entries.append(_checked(entry))
    return entries


def _checked(entry: Entry) -> Entry:
    """The entry with its id in its normal form. Raises BadRequest for what does not go together."""
    where, pair = f"Invalid input: {entry.where}", (entry.source, entry.destination)
    if entry.source not in ("volume", "image", "snapshot", "blank") or entry.destination not in ("volume", "local"):
        raise BadRequest(f"{where}: {entry.source!r} on {entry.destination!r} is no block device.")
    if entry.source in ("volume", "snapshot") and entry.destination == "local":
        raise BadRequest(f"{where}.destination_type: a {entry.source} is a volume, not 'local'.")
    if entry.source == "blank":
        if entry.id:
            raise BadRequest(f"{where}.uuid: a blank device is made of nothing.")
        if entry.boot_index is not None:
            raise BadRequest(f"{where}.boot_index: a blank device cannot be booted.")
    elif not entry.id:
        raise BadRequest(f"{where}.uuid: the id of the {entry.source} is needed.")
    if entry.guest_format == "swap" and pair != ("blank", "local"):
        raise BadRequest(f"{where}.guest_format: swap is a blank local device.")
    if pair == ("image", "local") and entry.boot_index != 0:
        raise BadRequest(f"{where}: mapping an image to local is only for the root disk, with boot_index 0.")
    if pair in (("image", "volume"), ("blank", "volume")) and not entry.size_gib:
        raise BadRequest(f"{where}.volume_size: a new volume of source {entry.source!r} needs a size.")
    if pair == ("image", "local") and entry.size_gib:
        raise BadRequest(f"{where}.volume_size: the root disk has the size of the flavor.")
    if entry.volume_type is not None and (entry.source == "volume" or entry.destination == "local"):
        raise BadRequest(f"{where}.volume_type: only a new volume gets a type.")
    if entry.id is None:
        return entry
    try:
        return msgspec.structs.replace(entry, id=str(uuid.UUID(entry.id)))
    except ValueError as error:
        raise BadRequest(f"{where}.uuid: {entry.id[:80]!r} is not an id.") from error


def _check_boot_order(entries: Sequence[Entry]) -> None:
    indexes = sorted(entry.boot_index for entry in entries if entry.boot_index is not None)
    if not indexes:
        raise BadRequest("Invalid input: server.imageRef: an image, or a block device with boot_index 0, is needed.")
    if indexes != list(range(len(indexes))):
        raise BadRequest(
            "Block Device Mapping is Invalid: Boot sequence for the instance and image/block device mapping "
            f"combination is not valid: boot_index {', '.join(map(str, indexes))}; 0 must be there once, with imageRef "
            "it is the image's."
        )


def _check_once(entries: Sequence[Entry]) -> None:
    things: dict[str, list[str | None]] = {
        "device_name": [_bare(entry.device) for entry in entries if entry.device],
        "tag": [entry.tag for entry in entries if entry.tag],
        "uuid": [entry.id for entry in entries if entry.source == "volume"],
    }
    for what, values in things.items():
        for value in values:
            if values.count(value) > 1:
                raise BadRequest(f"Invalid input: block devices: {what} {value!r} is there twice.")


def _boot_index(value: int | str | None, where: str) -> int | None:
    """None for what is not to be booted: nothing, or a negative number."""
    if value is None or value in ("", "None", "none"):
        return None
    if isinstance(value, str):
        if not re.fullmatch(r"-?[0-9]{1,3}", value):
            raise BadRequest(f"Invalid input: {where}.boot_index: {value[:40]!r} is not an integer.")
        value = int(value)
    return value if value >= 0 else None


def _size(value: int | str | None, where: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise BadRequest(f"Invalid input: {where}.volume_size: {value[:40]!r} is not a positive integer.")
        value = int(value)
    if value < 1:
        raise BadRequest(f"Invalid input: {where}.volume_size: {value} is not a positive integer.")
    return value


def _bare(device: str | None) -> str | None:
    return device.removeprefix("/dev/") if device else None
