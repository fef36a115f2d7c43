"""Names of a guest's disks, as the APIs show them: vda, vdb … A guest may number them otherwise."""

from __future__ import annotations

import re
import string
from collections.abc import Collection

from instar.errors import BadRequest, Conflict
from instar.lifecycle.definition import ephemeral_gib, swap_mib
from instar.model.instance import InstanceSpec

PREFIXES = {"virtio": "vd", "scsi": "sd"}
DEVICES_MAX = 26  # of one guest: the letters
_WANTED = re.compile(r"(?:/dev/)?((?:x?[a-z])?d)?([a-z])\Z")


def volume_bus(spec: InstanceSpec) -> str:
    """The bus of volumes: that of the image's disks, where volumes can be plugged into it."""
    wanted = spec.image.properties.get("hw_disk_bus", "virtio") if spec.image else "virtio"
    return wanted if wanted in PREFIXES else "virtio"


def local_devices(spec: InstanceSpec, bus: str, *, boots_from_volume: bool) -> set[str]:
    """The names that the disks on the host have, and the config drive."""
    others = (ephemeral_gib(spec) > 0) + (swap_mib(spec) > 0)
    # The disk that is booted is the first one, be it a volume.
    first, count = (1, others) if boots_from_volume else (0, others + 1)
    own = _names(bus)
    taken = set(own[first : first + count])
    if bus == "scsi":
        taken.add(own[first + count])  # the config drive is on this bus
    return taken


def free_device(taken: Collection[str], bus: str) -> str:
    """The first name that is not taken. Raises Conflict when there is none."""
    for name in _names(bus):
        if name not in taken:
            return name
    raise Conflict(f"No free disk device names for prefix '{PREFIXES[bus]}'")


def wanted_device(text: str, taken: Collection[str], bus: str) -> str:
    """The name that was asked for. One of another bus is no wish that can be met: then it is the first that is free.

    Raises BadRequest for what is no device's name, Conflict for one that is taken."""
    match = _WANTED.match(text)
    if match is None:
        raise BadRequest(f"The supplied device path ({text[:80]}) is invalid.")
    prefix, letter = match.groups()
    if prefix not in (PREFIXES[bus], None):
        return free_device(taken, bus)
    name = PREFIXES[bus] + letter
    if name in taken:
        raise Conflict(f"The supplied device path (/dev/{name}) is in use.")
    return name


def _names(bus: str) -> list[str]:
    return [PREFIXES[bus] + letter for letter in string.ascii_lowercase]
