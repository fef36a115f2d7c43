"""What the volume service needs of whoever has the data: the owner (`owner.py`), or one elsewhere (`remote_storage.py`).

What is to be done stands in the database before any of this is called: a call only says that it should be looked at now.
"""

from __future__ import annotations

from typing import Protocol

from instar.model.storage import StorageSubject
from instar.model.volume import VolumeConnection


def volume_subject(volume_id: str) -> StorageSubject:
    return StorageSubject("volume", volume_id)


def snapshot_subject(snapshot_id: str) -> StorageSubject:
    return StorageSubject("snapshot", snapshot_id)


class Storage(Protocol):
    async def wake(self, subject: StorageSubject) -> None:
        """What the record says is to be done begins now, or when the owner is back. Does not wait, and raises nothing."""
        ...

    async def ended(self, subject: StorageSubject) -> None:
        """Waits until nothing is to be done with it any more; for ever, if need be."""
        ...

    async def serve(self, attachment_id: str, *, host_ip: str) -> VolumeConnection:
        """The attachment's volume is served to its host. Raises NotFound (also for one that has no host by now),
        VolumeFailed, StorageAway."""
        ...

    async def release(self, volume_id: str) -> None:
        """The volume is served to nobody to whom the database does not give it. Raises StorageAway."""
        ...

    async def served(self) -> tuple[str, ...]:
        """Volumes that have a process that serves them. Raises StorageAway."""
        ...
