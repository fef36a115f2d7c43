"""The XML of a domain, built from values. The driver calls `domain_xml`; tests/hypervisor/golden holds an example.

Nothing here is a template: see device_xml.py, which has its disks and network devices. Rules tried on real guests: a q35
machine needs its free pcie-root-ports from the start; the config drive is a cdrom on virtio-scsi, because cloud kernels
have no AHCI; a TCG guest without a bound on its translation cache takes a hundred MiB more and reboots slower.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec

from instar.hypervisor.libvirt.device_xml import (
    add,
    add_config_drive,
    add_disk,
    add_interface,
    add_volume,
    boot_volume,
    taken_targets,
)
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import GuestDefinition
from instar.model.volume import VolumeDisk

METADATA_URI = "urn:instar:instance:1"
METADATA_PREFIX = "instar"
AGENT_CHANNEL = "org.qemu.guest_agent.0"

_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9_.-]")

ET.register_namespace(METADATA_PREFIX, METADATA_URI)


class DomainFiles(msgspec.Struct, frozen=True):
    """Where the files of one instance are. `disks` in the order of the definition; no `config_drive`: no such device."""

    disks: tuple[Path, ...]
    console_log: Path
    console_socket: Path
    vnc_socket: Path
    config_drive: Path | None = None


class HostFacts(msgspec.Struct, frozen=True):
    """What the XML needs to know of the host. `virt_type` is kvm or qemu."""

    cloud_id: str
    virt_type: str
    direct_io: bool


def domain_name(guest: GuestDefinition, cloud_id: str) -> str:
    """The libvirt name: what people call the instance, and the cloud, since names are unique on a host only together."""
    return f"{_NOT_IN_NAME.sub('-', guest.name)[:48]}-{cloud_id}"


def metadata_xml(instance_id: str, cloud_id: str, *, project_id: str = "", display_name: str = "") -> ET.Element:
    """The element by which a census knows whose domain it is."""
    element = ET.Element(f"{{{METADATA_URI}}}instance", id=instance_id, cloud=cloud_id)
    add(element, f"{{{METADATA_URI}}}project", project_id)
    add(element, f"{{{METADATA_URI}}}name", display_name)
    return element


def owner_of(metadata: str) -> tuple[str, str]:
    """(instance id, cloud id) of a metadata element as libvirt gives it back; empty where it has none."""
    element = ET.fromstring(metadata)  # noqa: S314 - libvirtd's own text, of a domain that a root user defined
    return element.get("id", ""), element.get("cloud", "")


def domain_xml(
    guest: GuestDefinition,
    files: DomainFiles,
    facts: HostFacts,
    *,
    settings: LibvirtSettings,
    bridge_name: Callable[[str], str],
) -> str:
    """The definition of the guest's domain. Raises HypervisorError for hints that name unknown devices."""
    domain = ET.Element("domain", type=facts.virt_type)
    add(domain, "uuid", guest.instance_id)
    add(domain, "name", domain_name(guest, facts.cloud_id))
    metadata = ET.SubElement(domain, "metadata")
    metadata.append(
        metadata_xml(guest.instance_id, facts.cloud_id, project_id=guest.project_id, display_name=guest.display_name)
    )
    add(domain, "memory", str(guest.memory_mib), unit="MiB")
    add(domain, "vcpu", str(guest.vcpus))
    _add_machine(domain, guest, facts, settings)
    devices = ET.SubElement(domain, "devices")
    boot = boot_volume(guest)
    # In the order in which guests number them: the one that boots, local disks, other volumes.
    if boot is not None:
        add_volume(devices, boot, taken=set(), boots=True)
    for disk, path in zip(guest.disks, files.disks, strict=True):
        add_disk(devices, disk, path, guest, direct_io=facts.direct_io)
    for volume in sorted(guest.volumes, key=_device_order):
        if volume is not boot:
            add_volume(devices, volume, taken=taken_targets(devices), boots=False)
    if files.config_drive is not None:
        add_config_drive(devices, files.config_drive, guest)
    for port in guest.ports:
        add_interface(devices, port, bridge_name(port.network.id), guest)
    _add_consoles(devices, files)
    _add_small_devices(devices, guest)
    _add_controllers(devices, guest, settings)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def _device_order(volume: VolumeDisk) -> tuple[int, str]:
    return len(volume.device), volume.device


def _add_machine(domain: ET.Element, guest: GuestDefinition, facts: HostFacts, settings: LibvirtSettings) -> None:
    sysinfo = add(domain, "sysinfo", type="smbios")
    system = add(sysinfo, "system")
    # Guests recognise an OpenStack cloud, and so its metadata service, by the product's name.
    for name, value in (
        ("manufacturer", "Instar"),
        ("product", "OpenStack Compute"),
        ("serial", guest.instance_id),
        ("uuid", guest.instance_id),
        ("family", "Virtual Machine"),
    ):
        add(system, "entry", value, name=name)
    system_os = add(domain, "os")
    add(system_os, "type", "hvm", arch="x86_64", machine="q35")
    add(system_os, "smbios", mode="sysinfo")
    features = add(domain, "features")
    add(features, "acpi")
    add(features, "apic")
    if facts.virt_type == "kvm":
        add(domain, "cpu", mode="host-model", check="partial")
    else:
        tcg = add(features, "tcg")
        add(tcg, "tb-cache", str(settings.tb_cache_mib), unit="MiB")
        cpu = add(domain, "cpu", mode="custom", match="exact", check="none")
        add(cpu, "model", settings.cpu_model_qemu, fallback="forbid")
    clock = add(domain, "clock", offset="utc")
    add(clock, "timer", name="pit", tickpolicy="delay")
    add(clock, "timer", name="rtc", tickpolicy="catchup")
    add(clock, "timer", name="hpet", present="no")
    add(domain, "on_poweroff", "destroy")
    add(domain, "on_reboot", "restart")
    add(domain, "on_crash", "destroy")


def _add_consoles(devices: ET.Element, files: DomainFiles) -> None:
    serial = add(devices, "serial", type="unix")
    add(serial, "source", mode="bind", path=str(files.console_socket))
    add(serial, "log", file=str(files.console_log), append="on")
    add(serial, "target", port="0")
    channel = add(devices, "channel", type="unix")
    add(channel, "target", type="virtio", name=AGENT_CHANNEL)
    add(devices, "graphics", type="vnc", socket=str(files.vnc_socket))
    video = add(devices, "video")
    add(video, "model", type="vga")


def _add_small_devices(devices: ET.Element, guest: GuestDefinition) -> None:
    if guest.properties.get("hw_pointer_model") == "usbtablet":
        add(devices, "controller", type="usb", model="qemu-xhci")
        add(devices, "input", type="tablet", bus="usb")
    else:
        add(devices, "controller", type="usb", model="none")
    balloon = add(devices, "memballoon", model="virtio")
    add(balloon, "stats", period="10")
    rng = add(devices, "rng", model="virtio")
    add(rng, "backend", "/dev/urandom", model="random")


def _add_controllers(devices: ET.Element, guest: GuestDefinition, settings: LibvirtSettings) -> None:
    """The PCIe topology: a root port for each virtio device, and the free ones for devices plugged in later."""
    buses = {target.get("bus") for target in devices.iter("target")}
    taken = 3  # balloon, rng, virtio-serial
    if "scsi" in buses:
        add(devices, "controller", type="scsi", index="0", model="virtio-scsi")
        taken += 1
    taken += sum(1 for target in devices.iter("target") if target.get("bus") == "virtio")
    taken += len(guest.ports)
    add(devices, "controller", type="pci", index="0", model="pcie-root")
    for index in range(taken + settings.pcie_root_ports):
        add(devices, "controller", type="pci", index=str(index + 1), model="pcie-root-port")
