"""What the contract suite needs besides the contract: trouble made from outside, and a look at what really is.

Each implementation has one class that satisfies `Harness`; tests/hypervisor/conftest.py names them.
"""

from __future__ import annotations

from typing import Protocol

from instar.hypervisor.contract import Hypervisor
from instar.model.guest import GuestEvent, ImageSource
from instar.model.network import NetworkDefinition
from instar.model.volume import VolumeConnection


class Harness(Protocol):
    """One host under test. `events` are those that the open hypervisor has told so far."""

    hypervisor: Hypervisor
    events: list[GuestEvent]

    def image(self, *, heeds_power_button: bool = True) -> ImageSource:
        """An image that the host can fetch. Its guest heeds ACPI: it powers off when the button is pressed and lets go
        of devices. Or it is deaf to both."""
        ...

    def broken_image(self) -> ImageSource:
        """An image whose content does not match its checksum."""
        ...

    def network(self) -> NetworkDefinition: ...

    async def volume(self, *, size_bytes: int = 1 << 20, over_tcp: bool = False) -> VolumeConnection:
        """A new empty volume that the host can reach."""
        ...

    async def wait_until_booted(self, instance_id: str, *, boots: int) -> None:
        """The guest has booted so far that it heeds the power button; `boots` is the count on its own root disk."""
        ...

    async def kill_guest(self, instance_id: str) -> None:
        """The guest's process dies, behind the hypervisor's back."""
        ...

    async def pause_guest(self, instance_id: str) -> None: ...

    async def lose_domain(self, instance_id: str) -> None:
        """Somebody destroyed and undefined the domain; its disks are still there."""
        ...

    async def detach_nics(self, instance_id: str) -> None:
        """Somebody pulled all network devices of the guest out, of the running one and of its definition."""
        ...

    async def lose_config_drive(self, instance_id: str) -> None: ...

    async def nic_count(self, instance_id: str) -> int:
        """Network devices that the guest has now."""
        ...

    async def reopen(self) -> None:
        """The Instar process ended without a word and another one opens the same host."""
        ...

    async def daemon_away(self) -> None:
        """The hypervisor's daemon dies and stays away; guests go on."""
        ...

    async def daemon_back(self) -> None: ...

    async def close(self) -> None:
        """Nothing is left: guests, networks, files, processes."""
        ...
