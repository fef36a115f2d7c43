"""A guest as a host sees it: its definition, its state, and what the host has."""

from __future__ import annotations

import msgspec

from instar.model.network import PortDefinition
from instar.model.states import PowerState


class ImageSource(msgspec.Struct, frozen=True):
    """Where a host gets an image. `location` is a URL (file: on the same machine, else http:), `sha256` is verified."""

    id: str
    location: str
    format: str  # qcow2 | raw
    sha256: str
    size_bytes: int
    virtual_size_bytes: int


class DiskDefinition(msgspec.Struct, frozen=True):
    """A disk of an instance. `name` is its role: root, ephemeral0, swap. With `image` it is a copy-on-write overlay.

    `size_bytes` is the virtual size; never smaller than the image's."""

    name: str
    size_bytes: int
    image: ImageSource | None = None
    bus: str = "virtio"


class ConfigDrive(msgspec.Struct, frozen=True):
    """The OpenStack config drive: JSON documents as text, user data as bytes."""

    meta_data: str
    network_data: str
    user_data: bytes | None = None


class GuestDefinition(msgspec.Struct, frozen=True):
    """All that a hypervisor needs to define and start a guest. `name` is for people (instance-0000002a)."""

    instance_id: str
    name: str
    vcpus: int
    memory_mib: int
    disks: tuple[DiskDefinition, ...]
    ports: tuple[PortDefinition, ...] = ()
    config_drive: ConfigDrive | None = None
    project_id: str = ""
    display_name: str = ""
    properties: dict[str, str] = {}  # image and flavor hints, e.g. hw_disk_bus, hw_vif_model


class GuestState(msgspec.Struct, frozen=True):
    """What is true on the host now. `domain_id` exists only while the guest runs, and changes with every start."""

    exists: bool
    power_state: PowerState = PowerState.NOSTATE
    domain_id: int | None = None


class SoftRebootOutcome(msgspec.Struct, frozen=True):
    """How waiting for a soft reboot ended: shut_down, restarted (under `state.domain_id`), timed_out."""

    outcome: str
    state: GuestState


class HostInventory(msgspec.Struct, frozen=True):
    """What a host has in all. Disk and memory are totals; what is claimed is the scheduler's matter."""

    vcpus: int
    memory_mib: int
    disk_gib: int
    hypervisor_type: str  # QEMU | simulated
    hypervisor_version: int
    hypervisor_hostname: str
    cpu_arch: str = "x86_64"
    cpu_model: str = ""
    cpu_features: tuple[str, ...] = ()
    virt_type: str = "qemu"  # kvm | qemu | simulated
    host_ip: str = "127.0.0.1"
    running_vms: int = 0
    free_disk_gib: int = 0


class HostCensus(msgspec.Struct, frozen=True):
    """What stands on the host, for the audit: everything that must have an owner. Instance, port, network and image ids."""

    guests: dict[str, GuestState]
    instance_dirs: tuple[str, ...]
    taps: tuple[str, ...]  # tap device names
    networks: tuple[str, ...]  # network ids that have a bridge, namespace or DHCP server here
    cached_images: tuple[str, ...] = ()  # sha256 of cached base images


class GuestEvent(msgspec.Struct, frozen=True):
    """The hypervisor says by itself that a guest changed. The receiver reads the state again: events may be late."""

    instance_id: str
    event: str  # started | stopped | crashed | paused | resumed | shutdown | removed
    state: GuestState
