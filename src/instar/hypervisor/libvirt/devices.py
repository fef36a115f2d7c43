"""NICs and volumes of a running guest: plugged in and pulled out. The driver calls it.

A guest that is off needs nothing: each start defines it anew. A device goes when the guest lets go of it, and libvirt tells
that by an event; QEMU cannot take a request back, so a guest that ignored it in time may still heed it later. A paused
guest cannot heed any: it is not even asked.

A device is found again by its alias. That of a volume which took the place of another one (volume_swap.py) is written in
the running domain's metadata, for an alias never changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from instar.errors import HypervisorError
from instar.hypervisor.libvirt import domains, memory
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.device_xml import add_interface, add_volume, port_alias, taken_targets, volume_alias
from instar.hypervisor.libvirt.guest_events import GuestEvents
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import GuestDefinition
from instar.model.states import PowerState

VOLUMES_URI = "urn:instar:volumes:1"
RETRY_S = 3.0  # a guest that was still booting had no ears

FindDevice = Callable[[ET.Element], ET.Element | None]


class GuestDevices:
    """`bridge_name` tells the bridge of a network."""

    def __init__(
        self,
        connection: LibvirtConnection,
        events: GuestEvents,
        *,
        settings: LibvirtSettings,
        bridge_name: Callable[[str], str],
    ) -> None:
        self._connection, self._events, self._settings = connection, events, settings
        self._bridge_name = bridge_name

    async def ensure_port_plugged(self, guest: GuestDefinition, port_id: str) -> None:
        port = next((port for port in guest.ports if port.id == port_id), None)
        if port is None:
            raise HypervisorError(reason="the port is none of the guest's")
        bridge = self._bridge_name(port.network.id)

        def plug(connection: Any) -> None:
            domain = _running(connection, guest.instance_id)
            if domain is None or device_of_port(live_xml(domain), port_id) is not None:
                return
            element = add_interface(ET.Element("devices"), port, bridge, guest)
            self._attach(domain, element)

        await self._connection.run(plug)

    async def ensure_port_unplugged(self, instance_id: str, port_id: str) -> None:
        await self._unplug(instance_id, lambda live: device_of_port(live, port_id), "network device")

    async def ensure_volume_attached(self, guest: GuestDefinition, volume_id: str) -> None:
        volume = next((volume for volume in guest.volumes if volume.volume_id == volume_id), None)
        if volume is None:
            raise HypervisorError(reason="the volume is none of the guest's")

        def plug(connection: Any) -> None:
            domain = _running(connection, guest.instance_id)
            if domain is None:
                return
            live = live_xml(domain)
            if device_of_volume(live, volume_id) is not None:
                return
            devices = ET.Element("devices")
            element = add_volume(devices, volume, taken=taken_targets(live), boots=False)
            if element.find("target[@bus='scsi']") is not None and live.find("devices/controller[@type='scsi']") is None:
                raise HypervisorError(reason="the running guest has no SCSI controller")
            alias = _free_alias(live, volume_id)
            _set_alias(element, alias)
            name_volume(domain, live, alias, volume_id)
            self._attach(domain, element)

        await self._connection.run(plug)

    async def ensure_volume_detached(self, instance_id: str, volume_id: str) -> None:
        await self._unplug(instance_id, lambda live: device_of_volume(live, volume_id), "volume")

    def _attach(self, domain: Any, element: ET.Element) -> None:
        """Blocking. Raises HypervisorError when the machine has no slot left."""
        try:
            domain.attachDeviceFlags(ET.tostring(element, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)
        except libvirt.libvirtError as error:
            if "PCI slots" not in str(error.get_error_message()):
                raise
            number = self._settings.pcie_root_ports
            reason = f"the running guest has no free slot for another device: {number} were kept free when it started"
            raise HypervisorError(reason=reason) from None

    async def _unplug(self, instance_id: str, find: FindDevice, what: str) -> None:
        loop = asyncio.get_running_loop()
        limit_s = self._settings.unplug_timeout_s
        deadline = loop.time() + limit_s
        with self._events.watch(instance_id) as changed:
            while True:
                changed.clear()
                if await self._connection.run(lambda connection: _request(connection, instance_id, find)):
                    return
                ask_again_at = min(deadline, loop.time() + RETRY_S)
                try:
                    async with asyncio.timeout_at(ask_again_at):
                        while not await self._connection.run(lambda connection: _is_gone(connection, instance_id, find)):
                            await changed.wait()
                            changed.clear()
                        return
                except TimeoutError:
                    if loop.time() < deadline:
                        continue
                    reason = f"the guest did not let go of the {what} within {limit_s:g} seconds"
                    raise HypervisorError(reason=reason) from None


def live_xml(domain: Any) -> ET.Element:
    """The running domain as it is now. Blocking."""
    return ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))  # noqa: S314 - libvirtd's own text


def device_of_port(live: ET.Element, port_id: str) -> ET.Element | None:
    alias = port_alias(port_id)
    return next((nic for nic in live.findall("devices/interface") if alias_of(nic) == alias), None)


def device_of_volume(live: ET.Element, volume_id: str) -> ET.Element | None:
    names = _volume_names(live)
    for disk in live.findall("devices/disk[@type='network']"):
        alias = alias_of(disk)
        if (names[alias] == volume_id) if alias in names else (alias == volume_alias(volume_id)):
            return disk
    return None


def alias_of(device: ET.Element) -> str:
    alias = device.find("alias")
    return alias.get("name", "") if alias is not None else ""


def name_volume(domain: Any, live: ET.Element, alias: str, volume_id: str) -> None:
    """The running domain's metadata say that the device `alias` is this volume; names of devices that are gone go.
    Blocking."""
    before = _volume_names(live)
    standing = {alias_of(disk) for disk in live.findall("devices/disk")}
    names = {known: name for known, name in before.items() if known in standing and known != alias}
    if alias != volume_alias(volume_id):
        names[alias] = volume_id
    if names == before:
        return
    element = ET.Element("volumes")
    for known, name in names.items():
        ET.SubElement(element, "volume", alias=known, id=name)
    domain.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT,
        ET.tostring(element, encoding="unicode"),
        "instar-volumes",
        VOLUMES_URI,
        libvirt.VIR_DOMAIN_AFFECT_LIVE,
    )


def _volume_names(live: ET.Element) -> dict[str, str]:
    """Volume ids by the alias of their device, for devices whose alias does not tell."""
    return {
        volume.get("alias", ""): volume.get("id", "")
        for volumes in live.findall(f"metadata/{{{VOLUMES_URI}}}volumes")
        for volume in volumes
    }


def _free_alias(live: ET.Element, volume_id: str) -> str:
    """The volume's own alias, or another where that still belongs to the device on which the volume was before."""
    standing = {alias_of(disk) for disk in live.findall("devices/disk")}
    alias, number = volume_alias(volume_id), 1
    while alias in standing:
        number += 1
        alias = f"{volume_alias(volume_id)}-{number}"
    return alias


def _set_alias(element: ET.Element, name: str) -> None:
    alias = element.find("alias")
    if alias is not None:
        alias.set("name", name)


def _running(connection: Any, instance_id: str) -> Any | None:
    """The domain when it is active, else None. Raises HypervisorError for one whose memory is saved. Blocking."""
    domain = domains.find(connection, instance_id)
    if memory.is_saved(domain):
        raise HypervisorError(reason="the guest's memory is saved with the devices that it has")
    return domain if domain is not None and domain.isActive() else None


def _is_gone(connection: Any, instance_id: str, find: FindDevice) -> bool:
    domain = domains.find(connection, instance_id)
    return domain is None or not domain.isActive() or find(live_xml(domain)) is None


def _request(connection: Any, instance_id: str, find: FindDevice) -> bool:
    """Ask the guest to let go of the device. True when there is none. Blocking. Raises HypervisorError: it is paused."""
    domain = domains.find(connection, instance_id)
    device = find(live_xml(domain)) if domain is not None and domain.isActive() else None
    if domain is None or device is None:
        return True
    if domains.state_of(domain).power_state == PowerState.PAUSED:
        raise HypervisorError(reason="the guest is paused, it cannot let go of a device")
    try:
        domain.detachDeviceAlias(alias_of(device), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as error:
        # Asked before and not gone yet (QEMU takes a request once), or gone in this moment.
        if "in the process of unplug" not in str(error.get_error_message()) and not _is_gone(
            connection, instance_id, find
        ):
            raise
    return False
