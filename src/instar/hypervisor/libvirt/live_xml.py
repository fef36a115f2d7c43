"""The definition of a running guest as another host has to have it: the same devices, with that host's names.

Made from the domain's own XML, because addresses of devices must stay as the running guest knows them. Used by
live_migration.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.device_xml import add_volume_source
from instar.hypervisor.libvirt.domain_xml import METADATA_URI
from instar.model.guest import GuestDefinition
from instar.model.volume import VolumeConnection


class HostNames(msgspec.Struct, frozen=True):
    """What a host calls the things of one guest. `sockets` is its directory by a path that is short enough for them;
    `bridges` by network id, `volumes` (how they are reached from there) by volume id."""

    directory: str
    sockets: str
    name: str
    cloud: str
    bridges: dict[str, str]
    volumes: dict[str, VolumeConnection] = {}


def xml_for(xml: str, guest: GuestDefinition, here: Iterable[Path], there: HostNames) -> str:
    """`here`: the paths by which the guest's directory is named on this host. Raises HypervisorError."""
    domain = ET.fromstring(xml)  # noqa: S314 - libvirtd's own text
    devices = domain.find("devices")
    if devices is None:
        raise HypervisorError(reason="the definition of the running guest is damaged")
    # Its name stays: libvirt compares it, and takes the other host's from a parameter.
    for element in domain.iter(f"{{{METADATA_URI}}}instance"):
        element.set("cloud", there.cloud)
    _rename_files(devices, [f"{path}/" for path in here], there)
    _rename_bridges(devices, guest, there.bridges)
    _renew_volumes(devices, guest, there.volumes)
    for disk in devices.findall("disk"):
        for tag in ("backingStore", "mirror"):  # found out anew there
            for element in disk.findall(tag):
                disk.remove(element)
    for channel in devices.findall("channel[@type='unix']"):
        for source in channel.findall("source"):  # libvirtd's own choice of a path
            channel.remove(source)
    return ET.tostring(domain, encoding="unicode")


def copied_disks(xml: str, here: Iterable[Path]) -> list[str]:
    """Device names of the disks that are files of the guest's own; the config drive is none."""
    prefixes = tuple(f"{path}/" for path in here)
    names = []
    for disk in ET.fromstring(xml).findall("devices/disk[@type='file']"):  # noqa: S314 - libvirtd's own text
        source, target = disk.find("source"), disk.find("target")
        path = source.get("file", "") if source is not None else ""
        if target is not None and path.startswith(prefixes) and path.endswith(".qcow2"):
            names.append(target.get("dev", ""))
    return names


def _rename_files(devices: ET.Element, prefixes: list[str], there: HostNames) -> None:
    for element in devices.iter():
        for attribute, value in element.attrib.items():
            for prefix in prefixes:
                if value.startswith(prefix):
                    name = value.removeprefix(prefix)
                    directory = there.sockets if name.endswith(".sock") else there.directory
                    element.set(attribute, f"{directory}/{name}")
                    break


def _rename_bridges(devices: ET.Element, guest: GuestDefinition, bridges: Mapping[str, str]) -> None:
    networks = {port.mac_address.lower(): port.network.id for port in guest.ports}
    for interface in devices.findall("interface"):
        mac, source = interface.find("mac"), interface.find("source")
        network = networks.get(mac.get("address", "").lower()) if mac is not None else None
        if network is None or network not in bridges or source is None:
            raise HypervisorError(reason="the guest has a network device that the other host does not know")
        source.set("bridge", bridges[network])


def _renew_volumes(devices: ET.Element, guest: GuestDefinition, there: Mapping[str, VolumeConnection]) -> None:
    volumes = {volume.volume_id: volume for volume in guest.volumes}
    for disk in devices.findall("disk[@type='network']"):
        volume, was = volumes.get(disk.findtext("serial", "")), disk.find("source")
        if volume is None or was is None:
            raise HypervisorError(reason="the guest has a volume that the other host does not know")
        reached = there.get(volume.volume_id, volume.connection)
        source = add_volume_source(ET.Element("devices"), reached).find("source")
        if source is not None:
            position = list(disk).index(was)
            disk.remove(was)
            disk.insert(position, source)
