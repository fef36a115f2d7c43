"""Volumes as a host sees them: how one is reached, and as which device a guest has it."""

from __future__ import annotations

import msgspec


class VolumeGateway(msgspec.Struct, frozen=True):
    """Where a host of another machine reaches a volume: NBD over TLS. `user` and `secret` (hexadecimal) are the key of this
    host, which holds until it is detached; `export` is the name that it finds the volume by."""

    address: str
    port: int
    export: str
    user: str
    secret: str


class VolumeConnection(msgspec.Struct, frozen=True):
    """How a host reaches a volume: an NBD export, on a Unix socket of the same machine or on a TCP port.

    `export` is its unguessable name. `place` tells the directory of the socket from every other machine's: a host that does
    not see it there uses the `gateway`. Empty: the socket is where the host is."""

    export: str
    socket: str | None = None
    address: str | None = None
    port: int | None = None
    size_bytes: int = 0
    read_only: bool = False
    driver: str = "nbd"
    place: str = ""
    gateway: VolumeGateway | None = None


class VolumeDisk(msgspec.Struct, frozen=True):
    """A volume as a disk of a guest. `device` is the name without /dev/, `boot_index` 0 the disk that is booted."""

    volume_id: str
    connection: VolumeConnection
    device: str
    boot_index: int | None = None
    bus: str = "virtio"
    tag: str | None = None
    shareable: bool = False  # multiattach
