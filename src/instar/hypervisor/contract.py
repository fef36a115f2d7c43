"""What a hypervisor must do. Implemented by `libvirt` and `simulated`; both pass tests/hypervisor.

A driver only ensures: it is told what should be true, may be told again with the same arguments, decides nothing, knows
no HTTP and no database. Calls for one instance never overlap (the agent sees to that), `console_output` aside; calls
for different ones do. Calls that move data (they take a `report`) may be cancelled when a newer operation takes over: they
stop, and leave what a later call goes on with or replaces.

Every method raises HypervisorUnavailable when the hypervisor's daemon is away, HypervisorError when it refuses, DiskFull
when a file system is full. Nothing here shows a path of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.guest import (
    DiskDefinition,
    DiskOffer,
    GuestDefinition,
    GuestDiagnostics,
    GuestEvent,
    GuestState,
    HostCensus,
    HostInventory,
    ImageSource,
    LiveMigrationOptions,
    LiveTarget,
    SnapshotTaken,
    SnapshotTarget,
    SoftRebootOutcome,
    WorkProgress,
)
from instar.model.network import PortDefinition
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk

Report = Callable[[WorkProgress], None]


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
        """What is true of the guest now. One that is being migrated to this host does not run here before it has come: it
        exists at most, without a state. Where a migration left it for good it does not exist any more."""
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
        """The guest runs. Defined from `guest` when it does not run yet (one that is paused goes on, one whose memory was
        saved goes on from there); ports and disks must have been ensured. Returns when the hypervisor says RUNNING."""
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

    # --- memory ---------------------------------------------------------------------------------------------------------

    async def ensure_paused(self, instance_id: str) -> GuestState:
        """The guest's processors stand still, its memory stays. Raises HypervisorError for a guest that does not run."""
        ...

    async def ensure_suspended(self, instance_id: str) -> GuestState:
        """The guest does not run, its memory is saved on the host's disk: `ensure_running` goes on from there, also after
        a restart of the machine. Once more does nothing. Raises HypervisorError for one that neither runs nor is saved."""
        ...

    # --- disks ----------------------------------------------------------------------------------------------------------

    async def ensure_disk_size(self, instance_id: str, disk: DiskDefinition) -> None:
        """The disk is at least `size_bytes` large (never made smaller); one that is missing is made. The guest is off."""
        ...

    async def ensure_no_disk(self, instance_id: str, name: str) -> None:
        """The instance has no disk of this name. The guest does not use it."""
        ...

    async def ensure_disk_kept(self, instance_id: str, name: str) -> None:
        """The disk is put away under the name `<name>kept`, so that another can take its place. Nothing is done where one
        is kept already, or where there is no such disk. The guest is off."""
        ...

    async def ensure_disk_restored(self, instance_id: str, name: str) -> None:
        """What `ensure_disk_kept` put away is the disk again; nothing where nothing is kept. The guest is off."""
        ...

    async def take_snapshot(
        self, instance_id: str, disk: str, target: SnapshotTarget, report: Report
    ) -> SnapshotTaken:
        """A standalone copy of the disk as it is at one moment is at the target, written once and sparse; a running guest
        goes on (its agent, if any, is asked to quiesce). Again writes the target anew. Raises DiskFull, ImageGone."""
        ...

    # --- a move to another host, or to another size on the same one -------------------------------------------------------

    async def stream_address(self) -> StreamAddress:
        """Where this host takes streams, and by which certificate others know it."""
        ...

    async def ensure_set_aside(self, instance_id: str) -> None:
        """The instance's disks are put aside as they are (`<instance>_resize`); it has no domain and no port here. The
        guest is off. Once more does nothing."""
        ...

    async def offer_disks(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        """What is set aside may be fetched by the host `to`, for a time."""
        ...

    async def receive_disks(self, instance_id: str, offer: DiskOffer, report: Report) -> None:
        """The disks of the offer are the instance's disks here, with the base images that they need, checksums verified;
        what an interrupted call had fetched is not fetched again. From storage that both hosts share (or on the same host)
        nothing is copied: the disks are the same, and can be put back as they were. Disks that are here already stay.
        Raises StreamBroken when the source cannot be reached in time, DiskFull."""
        ...

    async def ensure_brought_back(self, instance_id: str) -> None:
        """What was set aside is the instance's again, with the disks as they were then; what was made of them since on this
        host (or on shared storage) is gone. The guest is off here. Nothing where nothing is set aside."""
        ...

    async def ensure_nothing_aside(self, instance_id: str) -> None:
        """Nothing is set aside any more, nor any snapshot kept for going back; the instance's disks stay as they are."""
        ...

    async def ensure_ready_for_live(self, guest: GuestDefinition, offer: DiskOffer) -> LiveTarget:
        """This host can receive the running guest: base images, empty disks of the right size (none where storage is
        shared), ports and config drive are there, and the source may reach what it needs."""
        ...

    async def offer_live(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        """What the running guest's disks are, for the host that is to receive it; it may fetch base images."""
        ...

    async def migrate_live(
        self, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, report: Report
    ) -> None:
        """The guest runs on the target and no longer here, with its memory and disks, its definition as `guest` says. One
        that is not here any more is not moved again. A failure (or an abort: raises MigrationAborted) leaves it running
        here. What stays of it here is removed by `ensure_absent`."""
        ...

    async def abort_live(self, instance_id: str) -> None:
        """A live migration of the guest, if one is running, ends with the guest here. May come beside `migrate_live`."""
        ...

    async def force_live(self, instance_id: str) -> None:
        """A live migration that runs is finished soon, at the cost of a longer pause (post-copy, or a paused guest)."""
        ...

    # --- devices of a guest -----------------------------------------------------------------------------------------------

    async def ensure_port_plugged(self, guest: GuestDefinition, port_id: str) -> None:
        """A running guest has the NIC of this port of `guest` (the port itself was ensured); one that is off gets it when
        it starts. Raises HypervisorError."""
        ...

    async def ensure_port_unplugged(self, instance_id: str, port_id: str) -> None:
        """The guest has no NIC of this port. Raises HypervisorError when the guest does not let go of it in time, and at
        once for one that is paused: it is not even asked."""
        ...

    async def ensure_volume_attached(self, guest: GuestDefinition, volume_id: str) -> None:
        """A running guest has the disk of this volume of `guest`; one that is off gets it when it starts."""
        ...

    async def ensure_volume_detached(self, instance_id: str, volume_id: str) -> None:
        """The guest has no disk of this volume. Raises HypervisorError as `ensure_port_unplugged` does."""
        ...

    async def swap_volume(self, instance_id: str, old_volume_id: str, new: VolumeDisk, report: Report) -> None:
        """The data of the old volume is on the new one, which the running guest has now in its place."""
        ...

    # --- questions and small wishes --------------------------------------------------------------------------------------

    async def set_password(self, instance_id: str, user: str, password: str) -> None:
        """The user of the guest has this password. Raises GuestAgentMissing where the guest runs no agent that does it."""
        ...

    async def has_guest_agent(self, instance_id: str) -> bool:
        """The guest runs, and an agent in it can be asked."""
        ...

    async def diagnostics(self, instance_id: str) -> GuestDiagnostics:
        """What the hypervisor counts of the running guest. Raises HypervisorError for one that does not run."""
        ...

    async def console_output(self, instance_id: str, *, length_bytes: int) -> bytes:
        """The last bytes of the serial console's log; empty when there is none."""
        ...

    async def offer_console(self, instance_id: str, kind: ConsoleKind, to: StreamAddress | None) -> ConsoleOffer:
        """The console of the running guest may be reached as a stream by the process `to`, for a moment (None: only says
        where). May be called while another call for the instance is at work. Raises NoRunningGuest, ConsoleUnavailable."""
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

    def instances_with_ports(self) -> tuple[str, ...]:
        """Those of `ensure_ports`."""
        ...

    async def remove_everything(self) -> None:
        """No bridge, namespace, DHCP server or filter of this cloud is left on the host."""
        ...
