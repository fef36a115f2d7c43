"""A guest's memory: held still (paused), saved on the host's disk (suspended), and brought back. The driver calls it.

libvirt keeps the saved memory ("managed save") with the XML of the guest that it belongs to, beside its definition: it
outlives restarts of libvirtd and of the machine. A guest goes on from there with the devices that it had.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import msgspec
import structlog

from instar.errors import HypervisorError
from instar.hypervisor.libvirt import domains
from instar.hypervisor.libvirt.backup_job import abort_backup
from instar.hypervisor.libvirt.failures import safe_reason
from instar.model.guest import GuestState
from instar.model.states import PowerState

log = structlog.get_logger()


def pause(connection: Any, instance_id: str) -> GuestState:
    """The guest's processors stand still. Raises HypervisorError when it does not run. Blocking."""
    domain = domains.find(connection, instance_id)
    state = domains.state_of(domain)
    if state.power_state == PowerState.PAUSED:
        return state
    if domain is None or state.domain_id is None:
        raise HypervisorError(reason="the guest does not run, it cannot be paused")
    domain.suspend()
    return msgspec.structs.replace(state, power_state=PowerState.PAUSED)


def save(connection: Any, instance_id: str) -> GuestState:
    """The guest's memory is on disk and the guest off. Raises HypervisorError for one that neither runs nor is saved.
    Blocking, for as long as the memory takes to be written."""
    domain = domains.find(connection, instance_id)
    if domain is not None and domain.isActive():
        abort_backup(domain)  # of a call that crashed; libvirt does one such job at a time
        # RUNNING: also one that was paused goes on when it is brought back.
        domain.managedSave(libvirt.VIR_DOMAIN_SAVE_RUNNING)
    elif not is_saved(domain):
        raise HypervisorError(reason="the guest does not run, its memory cannot be saved")
    return domains.observe(connection, instance_id)


def is_saved(domain: Any | None) -> bool:
    """The domain is off and goes on from saved memory when it is started. Blocking."""
    return domain is not None and not domain.isActive() and bool(domain.hasManagedSaveImage())


def bring_back(connection: Any, instance_id: str, xml: str) -> GuestState:
    """The guest goes on from its saved memory; `xml` is its definition of today, from which it takes where its volumes are
    reached. Raises HypervisorError when the memory cannot be used: it is kept, a hard reboot drops it. Blocking."""
    domain = connection.lookupByUUIDString(instance_id)
    try:
        saved = domain.managedSaveGetXMLDesc(libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
        renewed = with_sources_of(saved, xml)
        if renewed is not None:
            domain.managedSaveDefineXML(renewed)
        domains.create(domain)
    except libvirt.libvirtError as error:
        if domain.isActive():
            return domains.observe(connection, instance_id)
        log.warning("memory.not_restored", instance=instance_id, code=error.get_error_code(), text=str(error)[:1000])
        reason = safe_reason(str(error.get_error_message() or error))
        raise HypervisorError(
            reason=f"the saved memory of the guest cannot be restored ({reason}); a hard reboot starts it without"
        ) from None
    return domains.observe(connection, instance_id)


def with_sources_of(saved: str, today: str) -> str | None:
    """The saved XML with the network disks' sources of today's definition; None where they are the same already."""
    definition = ET.fromstring(saved)  # noqa: S314 - libvirtd's own text
    current = {
        disk.findtext("serial", ""): disk
        for disk in ET.fromstring(today).findall("devices/disk[@type='network']")  # noqa: S314 - our own text
    }
    changed = False
    for disk in definition.findall("devices/disk[@type='network']"):
        now, was = current.get(disk.findtext("serial", "")), disk.find("source")
        source = now.find("source") if now is not None else None
        if source is None or was is None or source_key(source) == source_key(was):
            continue
        position = list(disk).index(was)
        disk.remove(was)
        disk.insert(position, source)
        changed = True
    return ET.tostring(definition, encoding="unicode") if changed else None


def source_key(source: ET.Element) -> tuple[str, ...]:
    """What tells one network source from another, whatever else libvirt has added to it."""
    host = source.find("host")
    where = [host.get(name, "") for name in ("socket", "name", "port")] if host is not None else []
    return (source.get("protocol", ""), source.get("name", ""), *where)
