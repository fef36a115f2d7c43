"""The XML of disks and network devices, the same for a guest that starts and for one that they are plugged into.

Used by domain_xml.py and devices.py. Every text is set by ElementTree, which escapes it; characters that XML cannot hold
are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase
from xml.etree import ElementTree as ET

from instar.errors import HypervisorError
from instar.model.guest import DiskDefinition, GuestDefinition
from instar.model.network import PortDefinition
from instar.model.volume import VolumeConnection, VolumeDisk

DISK_BUSES: Mapping[str, str] = {"virtio": "vd", "scsi": "sd", "sata": "sd"}
RECONNECT_DELAY_S = 10  # a volume's server that is away so long costs no I/O error; libvirt 9.0 ignores it: io_errors.py

_VIF_MODELS = frozenset({"virtio", "e1000", "e1000e", "rtl8139"})
_CDROM_BUSES = frozenset({"scsi", "sata", "virtio"})
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, {name: _NOT_IN_XML.sub("", value) for name, value in attributes.items()})
    if text is not None:
        element.text = _NOT_IN_XML.sub("", text)
    return element


def hint(guest: GuestDefinition, name: str, default: str, allowed: frozenset[str]) -> str:
    """What the guest's properties say. Raises HypervisorError for what is not allowed."""
    value = guest.properties.get(name, default)
    if value not in allowed:
        raise HypervisorError(reason=f"{name} {value[:40]!r} is not one of {', '.join(sorted(allowed))}")
    return value


def port_alias(port_id: str) -> str:
    """By which the device of a port is found again to be unplugged."""
    return f"ua-{port_id}"


def volume_alias(volume_id: str) -> str:
    return f"ua-{volume_id}"


def taken_targets(devices: ET.Element) -> set[str]:
    return {target.get("dev", "") for target in devices.iter("target")}


def _free_target(prefix: str, taken: set[str]) -> str:
    """The next free device name. Guests do not follow it, but libvirt wants it unique."""
    letters = list(ascii_lowercase)
    for name in (prefix + head + tail for head in ["", *letters] for tail in letters):
        if name not in taken:
            return name
    raise HypervisorError(reason="the guest has too many disks")


def add_disk(devices: ET.Element, disk: DiskDefinition, path: Path, guest: GuestDefinition, *, direct_io: bool) -> None:
    default = disk.bus if disk.bus in DISK_BUSES else "virtio"
    bus = hint(guest, "hw_disk_bus", default, frozenset(DISK_BUSES))
    wishes = {volume.device for volume in guest.volumes}
    element = add(devices, "disk", type="file", device="disk")
    cache = "none" if direct_io else "writeback"
    add(element, "driver", name="qemu", type="qcow2", cache=cache, io="threads", discard="unmap")
    add(element, "source", file=str(path))
    add(element, "target", dev=_free_target(DISK_BUSES[bus], taken_targets(devices) | wishes), bus=bus)
    add(element, "serial", disk.name)
    if disk is guest.disks[0] and boot_volume(guest) is None:
        add(element, "boot", order="1")


def add_config_drive(devices: ET.Element, path: Path, guest: GuestDefinition) -> None:
    bus = hint(guest, "hw_cdrom_bus", "scsi", _CDROM_BUSES)
    wishes = {volume.device for volume in guest.volumes}
    element = add(devices, "disk", type="file", device="disk" if bus == "virtio" else "cdrom")
    add(element, "driver", name="qemu", type="raw")
    add(element, "source", file=str(path))
    add(element, "target", dev=_free_target(DISK_BUSES[bus], taken_targets(devices) | wishes), bus=bus)
    add(element, "readonly")


def boot_volume(guest: GuestDefinition) -> VolumeDisk | None:
    """The volume that the guest boots from, None where it boots from a disk."""
    return next((volume for volume in guest.volumes if volume.boot_index == 0), None)


def add_volume(devices: ET.Element, volume: VolumeDisk, *, taken: set[str], boots: bool) -> ET.Element:
    """The disk of a volume, under the device name that it wants unless that is among `taken`."""
    bus = volume.bus if volume.bus in DISK_BUSES else "virtio"
    prefix = DISK_BUSES[bus]
    wish = volume.device if re.fullmatch(prefix + "[a-z]{1,2}", volume.device) else ""
    element = add_volume_source(devices, volume.connection)
    for driver in element.findall("driver"):  # the guest waits, see io_errors.py
        driver.set("error_policy", "stop")
        driver.set("rerror_policy", "stop")
    add(element, "target", dev=wish if wish and wish not in taken else _free_target(prefix, taken), bus=bus)
    add(element, "serial", volume.volume_id)
    if volume.connection.read_only:
        add(element, "readonly")
    if volume.shareable:
        add(element, "shareable")
    if boots:
        add(element, "boot", order="1")
    add(element, "alias", name=volume_alias(volume.volume_id))
    return element


def add_volume_source(devices: ET.Element, connection: VolumeConnection) -> ET.Element:
    """A network disk with nothing but where its data is. Raises HypervisorError when it cannot be reached from a host."""
    if connection.driver != "nbd":
        raise HypervisorError(reason=f"this host reaches no volumes by {connection.driver[:40]!r}")
    element = add(devices, "disk", type="network", device="disk")
    add(element, "driver", name="qemu", type="raw", cache="none", io="threads", discard="unmap")
    source = add(element, "source", protocol="nbd", name=connection.export)
    if connection.socket is not None:
        add(source, "host", transport="unix", socket=connection.socket)
    elif connection.address is not None and connection.port is not None:
        add(source, "host", name=connection.address, port=str(connection.port))
    else:
        raise HypervisorError(reason="the volume's connection names neither a socket nor an address")
    add(source, "reconnect", delay=str(RECONNECT_DELAY_S))
    return element


def add_interface(devices: ET.Element, port: PortDefinition, bridge: str, guest: GuestDefinition) -> ET.Element:
    element = add(devices, "interface", type="bridge")
    add(element, "mac", address=port.mac_address)
    add(element, "source", bridge=bridge)
    add(element, "target", dev=port.tap_name)
    add(element, "model", type=hint(guest, "hw_vif_model", "virtio", _VIF_MODELS))
    add(element, "mtu", size=str(port.network.mtu))
    add(element, "alias", name=port_alias(port.id))
    return element
