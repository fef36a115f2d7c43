"""What a driver cannot do yet: each method goes as soon as the driver has it."""

from __future__ import annotations

from instar.errors import HypervisorError
from instar.hypervisor.contract import Report
from instar.model.guest import (
    DiskOffer,
    GuestDefinition,
    LiveMigrationOptions,
    LiveTarget,
)
from instar.model.stream import StreamAddress


class NotYet:
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
