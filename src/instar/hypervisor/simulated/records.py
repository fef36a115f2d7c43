"""What a simulated host remembers, and the changes that its log keeps.

A host's state is nothing but the sum of these changes: the same `Machine.apply` takes them when they happen and when
the log is read again, so what survives a crash is what was there.
"""

from __future__ import annotations

import msgspec

from instar.model.guest import GuestState
from instar.model.network import PortDefinition
from instar.model.states import PowerState
from instar.model.volume import VolumeDisk


class SimulatedPort(msgspec.Struct, frozen=True, array_like=True):
    """A plugged port; `addresses` are ip/prefix."""

    id: str
    network_id: str
    tap_name: str
    mac_address: str
    addresses: tuple[str, ...]


class SimulatedVolume(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A volume that a guest has as a disk."""

    volume_id: str
    device: str
    boot_index: int | None = None


class SimulatedContent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What stands on a disk, and travels with it: into snapshots and images, to other hosts, onto another volume."""

    boots: int = 0  # how often a guest has booted from it
    data: tuple[tuple[str, str], ...] = ()  # what guests have written, by key
    passwords_set: int = 0


NOTHING = SimulatedContent()


class SimulatedDisk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`image_sha256` is the image that it was made from, empty for a blank one."""

    size_bytes: int
    image_sha256: str = ""
    content: SimulatedContent = NOTHING


class SimulatedGuest(msgspec.Struct, frozen=True, array_like=True):
    """A defined guest. `domain_id` is there while it runs or is paused; `ports` are the NICs that it has now.

    `memory` names what its memory holds: the host and the domain id under which it booted; empty while it has none. It
    is `saved` while it is suspended. The guest has run for `ran_us`, and since `since_us` where that is not 0."""

    instance_id: str
    name: str
    vcpus: int
    memory_mib: int
    hostname: str
    ports: tuple[SimulatedPort, ...]
    power_state: PowerState = PowerState.SHUTDOWN
    domain_id: int | None = None
    disks: tuple[str, ...] = ()  # names of those that it was defined with, as the guest sees them
    volumes: tuple[SimulatedVolume, ...] = ()
    memory: str = ""
    saved: bool = False
    ran_us: int = 0
    since_us: int = 0
    has_agent: bool = False
    has_config_drive: bool = False

    def state(self) -> GuestState:
        return GuestState(True, self.power_state, self.domain_id)

    def boot_volume(self) -> str | None:
        return next((volume.volume_id for volume in self.volumes if volume.boot_index == 0), None)


class HostNoted(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The last domain id that was given out: none is ever given twice."""

    host: str
    last_domain_id: int


class GuestSet(msgspec.Struct, frozen=True, array_like=True, tag=1):
    host: str
    guest: SimulatedGuest


class GuestGone(msgspec.Struct, frozen=True, array_like=True, tag=2):
    host: str
    instance_id: str


class DiskMade(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A new disk; one that is made from an image has on it what the image has."""

    host: str
    instance_id: str
    name: str
    size_bytes: int
    image_sha256: str = ""


class ConsoleWritten(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Text that came on the console. `boots` is there in old logs: the boot counter on the root disk after it."""

    host: str
    instance_id: str
    text: bytes
    boots: int = 0


class DirectoryGone(msgspec.Struct, frozen=True, array_like=True, tag=5):
    host: str
    instance_id: str


class PortsSet(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The ports that the host's networks know of an instance; none: the instance has no lease or filter here."""

    host: str
    instance_id: str
    ports: tuple[SimulatedPort, ...]


class ImageCached(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """`content` is there for an image that was made of a simulated disk."""

    host: str
    sha256: str
    content: SimulatedContent | None = None


class DiskSet(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The disk is so: received, grown, put away, or written by the guest."""

    host: str
    instance_id: str
    name: str
    disk: SimulatedDisk


class DiskGone(msgspec.Struct, frozen=True, array_like=True, tag=9):
    host: str
    instance_id: str
    name: str


class DirectorySetAside(msgspec.Struct, frozen=True, array_like=True, tag=10):
    host: str
    instance_id: str


class DirectoryBroughtBack(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """What was set aside takes the place of what has been made since."""

    host: str
    instance_id: str


class AsideGone(msgspec.Struct, frozen=True, array_like=True, tag=12):
    host: str
    instance_id: str


class VolumeWritten(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """What stands on a volume, which is on no host; `host` is the one that wrote it, empty when a log is rewritten."""

    host: str
    volume_id: str
    content: SimulatedContent


Change = (
    HostNoted
    | GuestSet
    | GuestGone
    | DiskMade
    | ConsoleWritten
    | DirectoryGone
    | PortsSet
    | ImageCached
    | DiskSet
    | DiskGone
    | DirectorySetAside
    | DirectoryBroughtBack
    | AsideGone
    | VolumeWritten
)


class Together(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Changes of one moment, also of two hosts: after a crash either all of them are in the log or none."""

    changes: tuple[Change, ...]


LogRecord = Change | Together


def simulated_port(port: PortDefinition) -> SimulatedPort:
    addresses = tuple(f"{ip.ip_address}/{ip.prefix_length}" for ip in port.fixed_ips)
    return SimulatedPort(port.id, port.network.id, port.tap_name, port.mac_address, addresses)


def simulated_volume(volume: VolumeDisk) -> SimulatedVolume:
    return SimulatedVolume(volume.volume_id, volume.device, volume.boot_index)
