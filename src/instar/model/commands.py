"""What a conductor tells a host: one record for each thing to ensure. The tag is the message's kind.

A command carries the epoch of its operation: an agent refuses one that is older than what it has seen for the instance.
Fields may be added with a default; a field is never removed or given another meaning (an agent may be one version apart).
"""

from __future__ import annotations

import msgspec

from instar.model.guest import DiskDefinition, GuestDefinition, ImageSource
from instar.model.network import PortDefinition


class HostCommand(msgspec.Struct, frozen=True, kw_only=True):
    """Base: `instance_id` and `epoch` fence; a command about no instance has an empty id."""

    instance_id: str = ""
    epoch: int = 0


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


class TakeCensus(HostCommand, frozen=True, tag=True):
    pass


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
    | TakeCensus
)

HOST_QUEUE = "host."  # + the host's name
CONDUCTOR_QUEUE = "conductor"
GUEST_EVENTS = "guests.event"
CANCEL_TOPIC = "operations.cancel"
LEFTOVERS_TOPIC = "hosts.leftovers"  # body: the name of a host that something was left on
