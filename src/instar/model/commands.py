"""What a conductor tells a host: one record for each thing to ensure. The tag is the message's kind.

A command carries the epoch of its operation: an agent refuses one that is older than what it has seen for the instance.
Fields may be added with a default; a field is never removed or given another meaning (an agent may be one version apart).
"""

from __future__ import annotations

import msgspec

from instar.model.console import ConsoleKind
from instar.model.guest import (
    DiskDefinition,
    DiskOffer,
    GuestDefinition,
    ImageSource,
    LiveMigrationOptions,
    LiveTarget,
    SnapshotTarget,
    WorkProgress,
)
from instar.model.network import PortDefinition
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk


class HostCommand(msgspec.Struct, frozen=True, kw_only=True):
    """Base: `instance_id` and `epoch` fence; a command about no instance has an empty id. `session` is the host's that its
    sender last heard of: it is refused when it comes to another one. 0: the sender knows of none."""

    instance_id: str = ""
    epoch: int = 0
    session: int = 0


class Observe(HostCommand, frozen=True, tag=True):
    pass


class EnsureImage(HostCommand, frozen=True, tag=True):
    image: ImageSource


class EnsureDisk(HostCommand, frozen=True, tag=True):
    disk: DiskDefinition


class EnsureNoDisks(HostCommand, frozen=True, tag=True):
    pass


class EnsurePorts(HostCommand, frozen=True, tag=True):
    ports: tuple[PortDefinition, ...]


class EnsureNoPorts(HostCommand, frozen=True, tag=True):
    pass


class EnsureRunning(HostCommand, frozen=True, tag=True):
    guest: GuestDefinition


class EnsureRestarted(HostCommand, frozen=True, tag=True):
    guest: GuestDefinition
    was_domain_id: int | None


class EnsureStopped(HostCommand, frozen=True, tag=True):
    grace_s: float


class AwaitSoftReboot(HostCommand, frozen=True, tag=True):
    was_domain_id: int
    wait_s: float


class EnsureAbsent(HostCommand, frozen=True, tag=True):
    keep_disks: bool = False


class ReadConsole(HostCommand, frozen=True, tag=True):
    length_bytes: int


class EnsurePaused(HostCommand, frozen=True, tag=True):
    pass


class EnsureSuspended(HostCommand, frozen=True, tag=True):
    pass


class EnsureDiskSize(HostCommand, frozen=True, tag=True):
    disk: DiskDefinition


class EnsureNoDisk(HostCommand, frozen=True, tag=True):
    name: str


class EnsureDiskKept(HostCommand, frozen=True, tag=True):
    name: str


class EnsureDiskRestored(HostCommand, frozen=True, tag=True):
    name: str


class TakeSnapshot(HostCommand, frozen=True, tag=True):
    disk: str
    target: SnapshotTarget


class TellStreamAddress(HostCommand, frozen=True, tag=True):
    pass


class EnsureSetAside(HostCommand, frozen=True, tag=True):
    pass


class OfferDisks(HostCommand, frozen=True, tag=True):
    to: StreamAddress


class ReceiveDisks(HostCommand, frozen=True, tag=True):
    offer: DiskOffer


class EnsureBroughtBack(HostCommand, frozen=True, tag=True):
    pass


class EnsureNothingAside(HostCommand, frozen=True, tag=True):
    pass


class OfferLive(HostCommand, frozen=True, tag=True):
    to: StreamAddress


class EnsureReadyForLive(HostCommand, frozen=True, tag=True):
    guest: GuestDefinition
    offer: DiskOffer


class MigrateLive(HostCommand, frozen=True, tag=True):
    guest: GuestDefinition
    target: LiveTarget
    options: LiveMigrationOptions


class AbortLive(HostCommand, frozen=True, tag=True):
    pass


class ForceLive(HostCommand, frozen=True, tag=True):
    pass


class EnsurePortPlugged(HostCommand, frozen=True, tag=True):
    guest: GuestDefinition
    port_id: str


class EnsurePortUnplugged(HostCommand, frozen=True, tag=True):
    port_id: str


class EnsureVolumeAttached(HostCommand, frozen=True, tag=True):
    guest: GuestDefinition
    volume_id: str


class EnsureVolumeDetached(HostCommand, frozen=True, tag=True):
    volume_id: str


class SwapVolume(HostCommand, frozen=True, tag=True):
    old_volume_id: str
    new: VolumeDisk


class SetPassword(HostCommand, frozen=True, tag=True):
    user: str
    password: str


class AskGuestAgent(HostCommand, frozen=True, tag=True):
    pass


class ReadDiagnostics(HostCommand, frozen=True, tag=True):
    pass


class OpenConsole(HostCommand, frozen=True, tag=True):
    """`to` None only asks whether there is one, and where."""

    kind: ConsoleKind
    to: StreamAddress | None = None


class TakeCensus(HostCommand, frozen=True, tag=True):
    pass


class Departed(msgspec.Struct, frozen=True):
    """An instance that a host may not have any more. `epoch`: older commands for it are refused from now on."""

    instance_id: str
    epoch: int
    keep_disks: bool = False


class Admit(HostCommand, frozen=True, tag=True):
    """A host that was cut off may work again, after it has removed what is not its own any more."""

    departed: tuple[Departed, ...] = ()


AnyCommand = (
    Observe
    | EnsureImage
    | EnsureDisk
    | EnsureNoDisks
    | EnsurePorts
    | EnsureNoPorts
    | EnsureRunning
    | EnsureRestarted
    | EnsureStopped
    | AwaitSoftReboot
    | EnsureAbsent
    | ReadConsole
    | OpenConsole
    | TakeCensus
    | Admit
    | EnsurePaused
    | EnsureSuspended
    | EnsureDiskSize
    | EnsureNoDisk
    | EnsureDiskKept
    | EnsureDiskRestored
    | TakeSnapshot
    | TellStreamAddress
    | EnsureSetAside
    | OfferDisks
    | ReceiveDisks
    | EnsureBroughtBack
    | EnsureNothingAside
    | OfferLive
    | EnsureReadyForLive
    | MigrateLive
    | AbortLive
    | ForceLive
    | EnsurePortPlugged
    | EnsurePortUnplugged
    | EnsureVolumeAttached
    | EnsureVolumeDetached
    | SwapVolume
    | SetPassword
    | ReadDiagnostics
    | AskGuestAgent
)

# What a host does also while it is shut, see agent/admission.py: nothing of it changes a guest.
WHILE_SHUT = (Observe, TakeCensus, TellStreamAddress, Admit, ReadConsole, ReadDiagnostics, AskGuestAgent, AbortLive)
# Questions and wishes that are answered at any time, also while another command for the instance works.
UNFENCED = (ReadConsole, OpenConsole, ReadDiagnostics, AskGuestAgent, AbortLive, ForceLive)


class HostProgress(msgspec.Struct, frozen=True, tag=True):
    """How far a command is that moves data; `epoch` is the command's."""

    host: str
    epoch: int
    progress: WorkProgress


PROTOCOL = 2  # of commands and reports; 1 had no sessions
HOSTS_HEARD = "hosts.heard."  # + the name of the first host of an agent; body: the number that a report asked with
HOST_QUEUE = "host."  # + the host's name
CONDUCTOR_QUEUE = "conductor"
GUEST_EVENTS = "guests.event"
WORK_PROGRESS = "guests.progress"  # body: HostProgress
CANCEL_TOPIC = "operations.cancel"
CONDUCTOR_LEFT_TOPIC = "conductors.left"  # body: the id of one that is not registered any more
LEFTOVERS_TOPIC = "hosts.leftovers"  # body: the name of a host that something was left on
PORTS_CHANGED = "networks.ports_changed"  # no body: the database has notes of what hosts are to be told
