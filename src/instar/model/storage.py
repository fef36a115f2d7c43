"""What a process tells the owner of the volumes' data: one record for each wish. The tag is the message's kind.

Every wish names a record, never what to do: the owner reads the database and makes it so. So each may come twice, late, or
not at all (the owner looks by itself, too). Fields may be added with a default, never removed.
"""

from __future__ import annotations

from typing import Literal

import msgspec

STORAGE_QUEUE = "volumes"


class StorageSubject(msgspec.Struct, frozen=True):
    """A volume or a snapshot."""

    kind: Literal["volume", "snapshot"]
    id: str


class LookAt(msgspec.Struct, frozen=True, tag=True):
    """There may be something to do with it, or no longer. Answered at once, with nothing."""

    subject: StorageSubject


class ServeVolume(msgspec.Struct, frozen=True, tag=True):
    """The attachment's host can reach its volume. `host_ip` is where that host is. Answered by a VolumeConnection."""

    attachment_id: str
    host_ip: str = ""


class ReleaseVolume(msgspec.Struct, frozen=True, tag=True):
    """The volume is served to nobody to whom the database does not give it. Answered when it is so."""

    volume_id: str


class TellServed(msgspec.Struct, frozen=True, tag=True):
    """Answered by the ids of volumes that are served, a list."""


StorageWish = LookAt | ServeVolume | ReleaseVolume | TellServed
