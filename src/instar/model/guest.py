"""A guest as a host sees it: its definition, its state, and what the host has."""

from __future__ import annotations

import msgspec

from instar.model.network import PortDefinition
from instar.model.states import PowerState
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk


class ImageSource(msgspec.Struct, frozen=True):
    """Where a host gets an image. `location` is a URL (file: on the same machine, else http:), `sha256` is verified."""

    id: str
    location: str
    format: str  # qcow2 | raw
    sha256: str
    size_bytes: int
    virtual_size_bytes: int


class DiskDefinition(msgspec.Struct, frozen=True):
    """A disk of an instance. `name` is its role: root, ephemeral0, swap, rescue. With `image`: a copy-on-write overlay.

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
    """All that a hypervisor needs to define and start a guest. `name` is for people (instance-0000002a).

    It boots from the volume whose `boot_index` is 0, else from the first of `disks`."""

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
    volumes: tuple[VolumeDisk, ...] = ()


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
    damaged_images: tuple[str, ...] = ()  # those that disks stand on although their content is not what it was
    set_aside: tuple[str, ...] = ()  # instances whose disks are kept here while a resize waits to be confirmed
    with_ports: tuple[str, ...] = ()  # instances whose ports are set up here
    boot_id: str = ""  # the start of the machine in which this was seen; the agent says it, hypervisors need not


class GuestEvent(msgspec.Struct, frozen=True):
    """The hypervisor says by itself that a guest changed. The receiver reads the state again: events may be late."""

    instance_id: str
    event: str  # started | stopped | crashed | paused | resumed | shutdown | removed
    state: GuestState


class SnapshotTarget(msgspec.Struct, frozen=True):
    """Where a host writes the copy of a disk: a URL of the image service (file: on the same machine, else http:)."""

    image_id: str
    location: str
    format: str = "qcow2"


class SnapshotTaken(msgspec.Struct, frozen=True):
    """A copy that was written whole: the size of its file, and that of the disk which a guest sees."""

    size_bytes: int
    virtual_size_bytes: int


class DiskFile(msgspec.Struct, frozen=True):
    """A file of a disk as another host will have it. It is an overlay of the cached image `base_sha256`, or of another
    file of the same offer, `below`, or of nothing."""

    name: str
    virtual_size_bytes: int
    size_bytes: int
    base_sha256: str | None = None
    base_format: str = "qcow2"
    below: str = ""


class DiskOffer(msgspec.Struct, frozen=True):
    """Disks that a host lets one other host fetch, what others stand on first. `marker` is a file name that who shares its
    storage can see, another one for each time that disks are set aside. `other_files`: small ones of the guest."""

    source: StreamAddress
    disks: tuple[DiskFile, ...]
    marker: str = ""
    other_files: tuple[str, ...] = ()


class LiveTarget(msgspec.Struct, frozen=True):
    """A host that is ready to receive a running guest; `details` are the driver's own, told to the source's driver."""

    address: StreamAddress
    shared_storage: bool = False
    details: dict[str, str] = {}


class LiveMigrationOptions(msgspec.Struct, frozen=True):
    """How a live migration runs. `bandwidth_mib_s` 0 is no limit."""

    bandwidth_mib_s: int = 0
    downtime_ms: int = 500


class MigrationProgress(msgspec.Struct, frozen=True):
    """How far a move of a guest's memory and disks is, in bytes."""

    memory_total: int = 0
    memory_processed: int = 0
    memory_remaining: int = 0
    disk_total: int = 0
    disk_processed: int = 0
    disk_remaining: int = 0


class WorkProgress(msgspec.Struct, frozen=True):
    """Told by a host while a command moves data: percent of the whole, and the bytes of a migration where it is one."""

    instance_id: str
    percent: int
    migration: MigrationProgress | None = None


class NicDiagnostics(msgspec.Struct, frozen=True):
    mac_address: str
    rx_octets: int | None = None
    rx_errors: int | None = None
    rx_drop: int | None = None
    rx_packets: int | None = None
    tx_octets: int | None = None
    tx_errors: int | None = None
    tx_drop: int | None = None
    tx_packets: int | None = None


class DiskDiagnostics(msgspec.Struct, frozen=True):
    read_bytes: int | None = None
    read_requests: int | None = None
    write_bytes: int | None = None
    write_requests: int | None = None
    errors_count: int | None = None


class GuestDiagnostics(msgspec.Struct, frozen=True):
    """What a hypervisor counts of a running guest. Memory in MiB, times as their names say; None: not counted."""

    power_state: PowerState
    driver: str  # libvirt | simulated
    hypervisor: str  # kvm | qemu | simulated
    hypervisor_os: str = "linux"
    uptime_s: int | None = None
    vcpu_times_ns: tuple[int, ...] = ()
    memory_maximum_mib: int | None = None
    memory_used_mib: int | None = None
    nics: tuple[NicDiagnostics, ...] = ()
    disks: tuple[DiskDiagnostics, ...] = ()
    config_drive: bool = False
