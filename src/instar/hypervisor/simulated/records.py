"""What a simulated host remembers, and the changes that its log keeps.

A host's state is nothing but the sum of these changes: the same `Machine.apply` takes them when they happen and when
the log is read again, so what survives a crash is what was there.
"""

from __future__ import annotations

import msgspec

from instar.model.guest import GuestState
from instar.model.network import PortDefinition
from instar.model.states import PowerState


class SimulatedPort(msgspec.Struct, frozen=True, array_like=True):
    """A plugged port; `addresses` are ip/prefix."""

    id: str
    network_id: str
    tap_name: str
    mac_address: str
    addresses: tuple[str, ...]


class SimulatedGuest(msgspec.Struct, frozen=True, array_like=True):
    """A defined guest. `domain_id` is there while it runs or is paused; `ports` are the NICs that it has now."""

    instance_id: str
    name: str
    vcpus: int
    memory_mib: int
    hostname: str
    ports: tuple[SimulatedPort, ...]
    power_state: PowerState = PowerState.SHUTDOWN
    domain_id: int | None = None

    def state(self) -> GuestState:
        return GuestState(True, self.power_state, self.domain_id)


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
    host: str
    instance_id: str
    name: str
    size_bytes: int


class ConsoleWritten(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Text that came on the console, and the boot counter on the root disk after it."""

    host: str
    instance_id: str
    text: bytes
    boots: int


class DirectoryGone(msgspec.Struct, frozen=True, array_like=True, tag=5):
    host: str
    instance_id: str


class PortsSet(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The ports that the host's networks know of an instance; none: the instance has no lease or filter here."""

    host: str
    instance_id: str
    ports: tuple[SimulatedPort, ...]


class ImageCached(msgspec.Struct, frozen=True, array_like=True, tag=7):
    host: str
    sha256: str


Change = HostNoted | GuestSet | GuestGone | DiskMade | ConsoleWritten | DirectoryGone | PortsSet | ImageCached


def simulated_port(port: PortDefinition) -> SimulatedPort:
    addresses = tuple(f"{ip.ip_address}/{ip.prefix_length}" for ip in port.fixed_ips)
    return SimulatedPort(port.id, port.network.id, port.tap_name, port.mac_address, addresses)
