"""What a hypervisor must do. Implemented by `libvirt` and `simulated`; both pass tests/hypervisor.

A driver only ensures: it is told what should be true, may be told again with the same arguments, decides nothing, knows
no HTTP and no database. Calls for one instance never overlap (the agent sees to that), `console_output` aside; calls
for different ones do.

Every method raises HypervisorUnavailable when the hypervisor's daemon is away, HypervisorError when it refuses, DiskFull
when a file system is full. Nothing here shows a path of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from instar.model.guest import (
    DiskDefinition,
    GuestDefinition,
    GuestEvent,
    GuestState,
    HostCensus,
    HostInventory,
    ImageSource,
    SoftRebootOutcome,
)
from instar.model.network import PortDefinition


class Hypervisor(Protocol):
    """One host's hypervisor. Each `ensure_*` makes something true and may be called again."""

    async def open(self, on_event: Callable[[GuestEvent], None]) -> None:
        """Connect, and tell events from now on (called on the event loop). Reconnects by itself when the daemon returns."""
        ...

    async def close(self) -> None:
        """Disconnect; guests go on."""
        ...

    async def inventory(self) -> HostInventory: ...

    async def observe(self, instance_id: str) -> GuestState:
        """What is true of the guest now."""
        ...

    async def ensure_image(self, image: ImageSource) -> None:
        """The image is in the host's cache, checksum verified. Many callers at once cause one copy."""
        ...

    async def ensure_disk(self, instance_id: str, disk: DiskDefinition) -> None:
        """The disk exists. One that exists already is kept as it is. The image must be in the cache."""
        ...

    async def ensure_no_disks(self, instance_id: str) -> None:
        """Nothing of the instance is on the host's file systems. The guest must not run."""
        ...

    async def ensure_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        """The networks of these ports exist on the host (bridge, DHCP) and know the ports (lease, packet filter)."""
        ...

    async def ensure_no_ports(self, instance_id: str) -> None:
        """No DHCP lease, filter or tap of the instance is left; networks without ports on this host are taken down."""
        ...

    async def ensure_running(self, guest: GuestDefinition) -> GuestState:
        """The guest runs. Defined from `guest` when it does not run yet (paused counts as running); ports and disks
        must have been ensured. Returns when the hypervisor says RUNNING."""
        ...

    async def ensure_restarted(self, guest: GuestDefinition, *, was_domain_id: int | None) -> GuestState:
        """The guest runs, freshly defined from `guest`, under another domain id than `was_domain_id` (hard reboot). One
        that does so already is left alone. Brings back a damaged domain, missing networks, taps and config drive."""
        ...

    async def ensure_stopped(self, instance_id: str, *, grace_s: float) -> GuestState:
        """The guest does not run: ACPI shutdown, then after `grace_s` destroyed. 0 destroys at once."""
        ...

    async def await_soft_reboot(self, instance_id: str, *, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        """Press the ACPI power button of the guest that runs as `was_domain_id`, and wait until it is shut down or runs
        under another id. A guest that is already either is not pressed."""
        ...

    async def ensure_absent(self, instance_id: str, *, keep_disks: bool) -> None:
        """No domain, port or (unless kept) disk of the instance is on this host."""
        ...

    async def console_output(self, instance_id: str, *, length_bytes: int) -> bytes:
        """The last bytes of the serial console's log; empty when there is none."""
        ...

    async def census(self) -> HostCensus:
        """Everything of ours on this host, for the audit."""
        ...


class HostNetwork(Protocol):
    """The networks of one Linux host. Implemented by `linux_network`; used by the libvirt driver."""

    async def open(self) -> None:
        """Find out what the kernel can, and adopt what an earlier process left."""
        ...

    async def close(self) -> None:
        """Stop watching; networks stay."""
        ...

    async def ensure_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        """Bridges, namespaces, DHCP servers and packet filters for these ports of the instance exist and are up to date.
        The taps themselves are made by the hypervisor and enslaved to `bridge_name`; filters may name them before."""
        ...

    async def ensure_no_ports(self, instance_id: str) -> None:
        """Filters and leases of the instance are gone; a network without ports on this host is taken down."""
        ...

    def bridge_name(self, network_id: str) -> str:
        """The bridge to which a tap of this network is attached."""
        ...

    async def census(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(tap names of ours, network ids that stand on this host)."""
        ...

    async def remove_everything(self) -> None:
        """No bridge, namespace, DHCP server or filter of this cloud is left on the host."""
        ...
