"""What the lifecycle needs of volumes. Implemented by `local.py`; a real Cinder will be another implementation.

An attachment says that an instance has a volume. It is made with `reserve`, under an id that the caller chose, before
anything happens on a host; `connect` gives it a host and makes the data reachable; `complete` says that the guest has it;
`detach` ends it. Every call may come twice, and `detach` and `delete` also stand a call that did nothing, or half.

**Attach**: reserve → connect → (host) → complete. **Detach**: mark_detaching → (host) → detach. **Swap**: reserve, connect
the new one; mark_detaching the old one; (host copies); complete the new one; detach the old one. **Another host**
(cold): `detach(keep_reservation=True)` → connect there → complete. **Live migration**: a second attachment of the same
instance for the other host; afterwards the first is detached. **Offloaded**: `detach(keep_reservation=True)`.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from instar.model.volume import VolumeConnection


class VolumeInfo(msgspec.Struct, frozen=True):
    """A volume as the lifecycle sees it. `status` available|in-use|reserved|creating|attaching|detaching|error…

    `image_metadata` holds the properties of the image that it was made of (`image_id`, `image_name`, `min_disk`,
    `min_ram`, hw_… and os_…), as text; the minima are 0 where there was none."""

    id: str
    name: str
    status: str
    size_gib: int
    bootable: bool
    multiattach: bool
    project_id: str
    availability_zone: str
    image_metadata: dict[str, str] = {}
    min_disk_gib: int = 0
    min_ram_mib: int = 0


class SnapshotInfo(msgspec.Struct, frozen=True):
    """A snapshot of a volume. `status` creating|available|deleting|error."""

    id: str
    volume_id: str
    status: str
    size_gib: int
    bootable: bool
    image_metadata: dict[str, str] = {}


class VolumeAttachment(msgspec.Struct, frozen=True):
    """`status` reserved|attaching|attached|detaching. `host` and `device` are empty until it is connected; `device` is a
    name like /dev/vdb. `instance_id` is empty for one that a user of the Block Storage API made for no server."""

    id: str
    volume_id: str
    instance_id: str
    status: str
    host: str
    device: str


class VolumeService(Protocol):
    # --- volumes ------------------------------------------------------------------------------------------------------

    async def volume_fetch(self, volume_id: str, *, project_id: str, is_admin: bool) -> VolumeInfo:
        """Raises NotFound where it does not exist or this project may not see it."""
        ...

    async def create(
        self,
        volume_id: str,
        *,
        project_id: str,
        user_id: str,
        size_gib: int,
        name: str,
        image_id: str | None = None,
        snapshot_id: str | None = None,
        source_volume_id: str | None = None,
        volume_type: str | None = None,
        availability_zone: str | None = None,
    ) -> None:
        """A volume with this id is being made, of one source at most; `size_gib` 0 means the size of that source. Again
        with the same id: nothing. Raises QuotaExceeded; BadRequest for a source or type that is not there, is not ready,
        or is larger than the volume. Then nothing is taken."""
        ...

    async def until_available(self, volume_id: str, deadline_s: float) -> VolumeInfo:
        """Waits until the volume is made. Raises VolumeFailed where that failed, NotFound where it is gone, StepTimeout."""
        ...

    async def delete(self, volume_id: str) -> None:
        """The volume and its data are gone, whatever it was made of; also one that is being made. Again, or one that
        never was: nothing. Raises VolumeUnusable while it has attachments or snapshots."""
        ...

    async def reimage(self, volume_id: str, image_id: str, *, turn: str, deadline_s: float) -> None:
        """The volume's data is that of the image; what it had is kept under `turn`. Again with the same turn: nothing.
        Raises VolumeUnusable while a guest may have it open, or for one that is too small; ImageGone, VolumeFailed,
        StepTimeout (then it goes on)."""
        ...

    async def reimage_undo(self, volume_id: str, *, turn: str, deadline_s: float) -> None:
        """It has again what was kept under `turn`. Again, or where nothing was replaced: nothing. Raises as `reimage`."""
        ...

    async def reimage_end(self, volume_id: str, image_id: str, *, deadline_s: float) -> None:
        """Nothing is kept any more, and the volume says which image it is made of. Again: nothing."""
        ...

    # --- attachments --------------------------------------------------------------------------------------------------

    async def reserve(self, attachment_id: str, volume_id: str, *, instance_id: str, alone: bool = False) -> None:
        """The volume is kept for this instance. Again with the same id: nothing. Raises NotFound for a volume that is not
        there, VolumeUnusable for one that is not available or has (and is not multiattach) another instance. `alone`:
        nobody else has it, and gets it, until it is complete."""
        ...

    async def connect(self, attachment_id: str, *, host: str, host_ip: str, device: str) -> VolumeConnection:
        """The volume can be reached from this host, by what is returned; the data is served from now on. Again: the same
        with fresh information, also after `complete`, and for another host. Raises NotFound, VolumeFailed."""
        ...

    async def complete(self, attachment_id: str) -> None:
        """The guest has the volume: attached. Again: nothing. Raises NotFound."""
        ...

    async def mark_detaching(self, attachment_id: str, *, detaching: bool, alone: bool = False) -> None:
        """A detach begins (True), or did not succeed and the guest still has the volume (False, its undo). Again:
        nothing. `alone`: nobody else gets the volume meanwhile. Raises NotFound, and VolumeUnusable for one that is not
        attached, or (`alone`) for one whose volume others may write to."""
        ...

    async def detach(self, attachment_id: str, *, keep_reservation: bool = False) -> None:
        """The attachment is gone; nothing serves the data any more when it was the volume's last. With `keep_reservation`
        it stays reserved, of no host. Again, or one that never was: nothing."""
        ...

    async def attachments(self, instance_id: str | None = None) -> tuple[VolumeAttachment, ...]:
        """Those of an instance, the oldest first; None: all that belong to instances, for the audit."""
        ...

    async def writers(self, volume_id: str) -> int:
        """How many attachments of the volume may write to it."""
        ...

    async def served_in_vain(self) -> tuple[str, ...]:
        """Volumes whose data is served though none of their attachments has a host. For the audit."""
        ...

    async def stop_serving(self, volume_id: str) -> None:
        """Nothing serves the volume's data, unless an attachment has a host by now. Again: nothing."""
        ...

    # --- snapshots: createImage of a server that has its root on a volume, and servers made of such images ---------------

    async def snapshot_fetch(self, snapshot_id: str, *, project_id: str, is_admin: bool) -> SnapshotInfo:
        """Raises NotFound where it does not exist or this project may not see it."""
        ...

    async def snapshot_create(
        self, snapshot_id: str, volume_id: str, *, project_id: str, user_id: str, name: str, deadline_s: float
    ) -> SnapshotInfo:
        """A snapshot with this id, available; also of a volume that a guest has (what the guest has written but not
        flushed is not in it). Again with the same id: the same. Raises NotFound, QuotaExceeded, VolumeFailed,
        StepTimeout (then it goes on being made)."""
        ...

    async def snapshot_delete(self, snapshot_id: str) -> None:
        """The snapshot and its data are gone; volumes made of it are not touched. Again: nothing."""
        ...
