"""The XML of a domain, built from values. The driver calls `domain_xml`; tests/hypervisor/golden holds an example.

Nothing here is a template: every text is set by ElementTree, which escapes it, and characters that XML cannot hold are
dropped. Rules tried on real guests: a q35 machine needs its free pcie-root-ports from the start; the config drive is a
cdrom on virtio-scsi, because cloud kernels have no AHCI; a TCG guest without a bound on its translation cache takes a
hundred MiB more and reboots slower.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import DiskDefinition, GuestDefinition
from instar.model.network import PortDefinition

METADATA_URI = "urn:instar:instance:1"
METADATA_PREFIX = "instar"
AGENT_CHANNEL = "org.qemu.guest_agent.0"

_DISK_BUSES: Mapping[str, str] = {"virtio": "vd", "scsi": "sd", "sata": "sd"}
_VIF_MODELS = frozenset({"virtio", "e1000", "e1000e", "rtl8139"})
_CDROM_BUSES = frozenset({"scsi", "sata", "virtio"})
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
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
    _add(element, f"{{{METADATA_URI}}}project", project_id)
    _add(element, f"{{{METADATA_URI}}}name", display_name)
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
    _add(domain, "uuid", guest.instance_id)
    _add(domain, "name", domain_name(guest, facts.cloud_id))
    metadata = ET.SubElement(domain, "metadata")
    metadata.append(
        metadata_xml(guest.instance_id, facts.cloud_id, project_id=guest.project_id, display_name=guest.display_name)
    )
    _add(domain, "memory", str(guest.memory_mib), unit="MiB")
    _add(domain, "vcpu", str(guest.vcpus))
    _add_machine(domain, guest, facts, settings)
    devices = ET.SubElement(domain, "devices")
    for disk, path in zip(guest.disks, files.disks, strict=True):
        _add_disk(devices, disk, path, guest, facts)
    if files.config_drive is not None:
        _add_config_drive(devices, files.config_drive, guest)
    for port in guest.ports:
        _add_interface(devices, port, bridge_name(port.network.id), guest)
    _add_consoles(devices, files)
    _add_small_devices(devices, guest)
    _add_controllers(devices, guest, settings)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, {name: _NOT_IN_XML.sub("", value) for name, value in attributes.items()})
    if text is not None:
        element.text = _NOT_IN_XML.sub("", text)
    return element


def _hint(guest: GuestDefinition, name: str, default: str, allowed: frozenset[str]) -> str:
    value = guest.properties.get(name, default)
    if value not in allowed:
        raise HypervisorError(reason=f"{name} {value[:40]!r} is not one of {', '.join(sorted(allowed))}")
    return value


def _add_machine(domain: ET.Element, guest: GuestDefinition, facts: HostFacts, settings: LibvirtSettings) -> None:
    sysinfo = _add(domain, "sysinfo", type="smbios")
    system = _add(sysinfo, "system")
    # Guests recognise an OpenStack cloud, and so its metadata service, by the product's name.
    for name, value in (
        ("manufacturer", "Instar"),
        ("product", "OpenStack Compute"),
        ("serial", guest.instance_id),
        ("uuid", guest.instance_id),
        ("family", "Virtual Machine"),
    ):
        _add(system, "entry", value, name=name)
    system_os = _add(domain, "os")
    _add(system_os, "type", "hvm", arch="x86_64", machine="q35")
    _add(system_os, "smbios", mode="sysinfo")
    features = _add(domain, "features")
    _add(features, "acpi")
    _add(features, "apic")
    if facts.virt_type == "kvm":
        _add(domain, "cpu", mode="host-model", check="partial")
    else:
        tcg = _add(features, "tcg")
        _add(tcg, "tb-cache", str(settings.tb_cache_mib), unit="MiB")
        cpu = _add(domain, "cpu", mode="custom", match="exact", check="none")
        _add(cpu, "model", settings.cpu_model_qemu, fallback="forbid")
    clock = _add(domain, "clock", offset="utc")
    _add(clock, "timer", name="pit", tickpolicy="delay")
    _add(clock, "timer", name="rtc", tickpolicy="catchup")
    _add(clock, "timer", name="hpet", present="no")
    _add(domain, "on_poweroff", "destroy")
    _add(domain, "on_reboot", "restart")
    _add(domain, "on_crash", "destroy")


def _disk_bus(disk: DiskDefinition, guest: GuestDefinition) -> str:
    default = disk.bus if disk.bus in _DISK_BUSES else "virtio"
    return _hint(guest, "hw_disk_bus", default, frozenset(_DISK_BUSES))


def _next_target(devices: ET.Element, prefix: str) -> str:
    """The next free device name. Guests do not follow it, but libvirt wants it unique."""
    taken = sum(1 for target in devices.iter("target") if target.get("dev", "").startswith(prefix))
    return prefix + chr(ord("a") + taken)


def _add_disk(devices: ET.Element, disk: DiskDefinition, path: Path, guest: GuestDefinition, facts: HostFacts) -> None:
    bus = _disk_bus(disk, guest)
    element = _add(devices, "disk", type="file", device="disk")
    cache = "none" if facts.direct_io else "writeback"
    _add(element, "driver", name="qemu", type="qcow2", cache=cache, io="threads", discard="unmap")
    _add(element, "source", file=str(path))
    _add(element, "target", dev=_next_target(devices, _DISK_BUSES[bus]), bus=bus)
    _add(element, "serial", disk.name)
    if disk is guest.disks[0]:
        _add(element, "boot", order="1")


def _add_config_drive(devices: ET.Element, path: Path, guest: GuestDefinition) -> None:
    bus = _hint(guest, "hw_cdrom_bus", "scsi", _CDROM_BUSES)
    element = _add(devices, "disk", type="file", device="disk" if bus == "virtio" else "cdrom")
    _add(element, "driver", name="qemu", type="raw")
    _add(element, "source", file=str(path))
    _add(element, "target", dev=_next_target(devices, _DISK_BUSES[bus]), bus=bus)
    _add(element, "readonly")


def _add_interface(devices: ET.Element, port: PortDefinition, bridge: str, guest: GuestDefinition) -> None:
    element = _add(devices, "interface", type="bridge")
    _add(element, "mac", address=port.mac_address)
    _add(element, "source", bridge=bridge)
    _add(element, "target", dev=port.tap_name)
    _add(element, "model", type=_hint(guest, "hw_vif_model", "virtio", _VIF_MODELS))
    _add(element, "mtu", size=str(port.network.mtu))
    _add(element, "alias", name=f"ua-{port.id}")  # by which the port is found again to be unplugged


def _add_consoles(devices: ET.Element, files: DomainFiles) -> None:
    serial = _add(devices, "serial", type="unix")
    _add(serial, "source", mode="bind", path=str(files.console_socket))
    _add(serial, "log", file=str(files.console_log), append="on")
    _add(serial, "target", port="0")
    channel = _add(devices, "channel", type="unix")
    _add(channel, "target", type="virtio", name=AGENT_CHANNEL)
    _add(devices, "graphics", type="vnc", socket=str(files.vnc_socket))
    video = _add(devices, "video")
    _add(video, "model", type="vga")


def _add_small_devices(devices: ET.Element, guest: GuestDefinition) -> None:
    if guest.properties.get("hw_pointer_model") == "usbtablet":
        _add(devices, "controller", type="usb", model="qemu-xhci")
        _add(devices, "input", type="tablet", bus="usb")
    else:
        _add(devices, "controller", type="usb", model="none")
    balloon = _add(devices, "memballoon", model="virtio")
    _add(balloon, "stats", period="10")
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")


def _add_controllers(devices: ET.Element, guest: GuestDefinition, settings: LibvirtSettings) -> None:
    """The PCIe topology: a root port for each virtio device, and the free ones for devices plugged in later."""
    buses = {target.get("bus") for target in devices.iter("target")}
    taken = 3  # balloon, rng, virtio-serial
    if "scsi" in buses:
        _add(devices, "controller", type="scsi", index="0", model="virtio-scsi")
        taken += 1
    taken += sum(1 for target in devices.iter("target") if target.get("bus") == "virtio")
    taken += len(guest.ports)
    _add(devices, "controller", type="pci", index="0", model="pcie-root")
    for index in range(taken + settings.pcie_root_ports):
        _add(devices, "controller", type="pci", index=str(index + 1), model="pcie-root-port")
