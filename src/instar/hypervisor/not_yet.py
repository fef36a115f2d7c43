"""What a driver cannot do yet: each method goes as soon as the driver has it."""

from __future__ import annotations

from instar.errors import HypervisorError
from instar.hypervisor.contract import Report
from instar.model.guest import (
    DiskDefinition,
    DiskOffer,
    GuestDefinition,
    GuestDiagnostics,
    GuestState,
    LiveMigrationOptions,
    LiveTarget,
    SnapshotTaken,
    SnapshotTarget,
)
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk


class NotYet:
    async def ensure_paused(self, instance_id: str) -> GuestState:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_suspended(self, instance_id: str) -> GuestState:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_disk_size(self, instance_id: str, disk: DiskDefinition) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_no_disk(self, instance_id: str, name: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_disk_kept(self, instance_id: str, name: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_disk_restored(self, instance_id: str, name: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def take_snapshot(self, instance_id: str, disk: str, target: SnapshotTarget, report: Report) -> SnapshotTaken:
        raise HypervisorError(reason="this host cannot do that yet")

    async def stream_address(self) -> StreamAddress:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_set_aside(self, instance_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def offer_disks(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        raise HypervisorError(reason="this host cannot do that yet")

    async def receive_disks(self, instance_id: str, offer: DiskOffer, report: Report) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_brought_back(self, instance_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_nothing_aside(self, instance_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_ready_for_live(self, guest: GuestDefinition, offer: DiskOffer) -> LiveTarget:
        raise HypervisorError(reason="this host cannot do that yet")

    async def offer_live(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        raise HypervisorError(reason="this host cannot do that yet")

    async def migrate_live(
        self, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, report: Report
    ) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def abort_live(self, instance_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def force_live(self, instance_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_port_plugged(self, guest: GuestDefinition, port_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_port_unplugged(self, instance_id: str, port_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_volume_attached(self, guest: GuestDefinition, volume_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def ensure_volume_detached(self, instance_id: str, volume_id: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def swap_volume(self, instance_id: str, old_volume_id: str, new: VolumeDisk, report: Report) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def set_password(self, instance_id: str, user: str, password: str) -> None:
        raise HypervisorError(reason="this host cannot do that yet")

    async def diagnostics(self, instance_id: str) -> GuestDiagnostics:
        raise HypervisorError(reason="this host cannot do that yet")
