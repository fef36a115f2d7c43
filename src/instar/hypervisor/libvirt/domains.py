"""What the driver does with domains, as plain blocking functions of a libvirt connection.

They run in the connection's threads. A domain may vanish between two calls: that is an answer here, not an error.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.domain_xml import METADATA_URI, owner_of
from instar.model.guest import GuestState
from instar.model.states import PowerState

ABSENT = GuestState(exists=False)
CREATE_ATTEMPTS = 3

_POWER: Mapping[int, PowerState] = {
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.RUNNING,  # being shut down: it still has its process and its id
    libvirt.VIR_DOMAIN_SHUTOFF: PowerState.SHUTDOWN,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: PowerState.SUSPENDED,
}
_ARRIVING = frozenset({libvirt.VIR_DOMAIN_PAUSED_MIGRATION, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP})
_HELD_BY_ERROR = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)
_UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


def find(connection: Any, instance_id: str) -> Any | None:
    """The domain, None when there is none."""
    try:
        return connection.lookupByUUIDString(instance_id)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def state_of(domain: Any | None) -> GuestState:
    """What is true of the domain now."""
    if domain is None:
        return ABSENT
    try:
        state, reason = domain.state()
        if state == libvirt.VIR_DOMAIN_PAUSED and reason in _ARRIVING and _is_arriving(domain):
            return GuestState(exists=True)
        if not domain.isActive():
            # A domain that ended between the two calls is off, whatever the first one said.
            power = PowerState.CRASHED if state == libvirt.VIR_DOMAIN_CRASHED else PowerState.SHUTDOWN
            return GuestState(exists=True, power_state=power)
        domain_id = domain.ID()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return ABSENT
        raise
    power = _POWER.get(state, PowerState.NOSTATE)
    if (state, reason) == _HELD_BY_ERROR:
        power = PowerState.RUNNING  # it goes on by itself: io_errors.py
    return GuestState(exists=True, power_state=power, domain_id=domain_id)


def is_held_by_error(domain: Any) -> bool:
    """QEMU holds the guest still because of an I/O error; not one that is gone by now. Blocking."""
    try:
        return tuple(domain.state()) == _HELD_BY_ERROR
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return False
        raise


def _is_arriving(domain: Any) -> bool:
    """The process of a guest that is being migrated to this host. It is no guest before it has come: whoever took it for
    one would end the one at the source."""
    if not domain.isPersistent():  # it is defined when it has come; ours always are
        return True
    try:
        operation = domain.jobStats().get("operation")
    except libvirt.libvirtError:
        return False
    return bool(operation == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN)


def observe(connection: Any, instance_id: str) -> GuestState:
    # Looked up each time: a domain object keeps the id that it had when it was looked up.
    return state_of(find(connection, instance_id))


def observe_with_memory(connection: Any, instance_id: str) -> tuple[GuestState, bool]:
    """What is true of the domain, and whether it is off and goes on from saved memory when it is started."""
    domain = find(connection, instance_id)
    state = state_of(domain)
    saved = domain is not None and state.domain_id is None and not domain.isActive()
    return state, bool(saved and domain is not None and domain.hasManagedSaveImage())


def start(connection: Any, instance_id: str, xml: str) -> GuestState:
    """Define the domain from `xml` and start it. One that is active by now is left as it is."""
    domain = find(connection, instance_id)
    if domain is not None and domain.isActive():
        return observe(connection, instance_id)
    try:
        domain = connection.defineXML(xml)
    except libvirt.libvirtError:
        if domain is None:
            raise
        undefine(connection, instance_id)  # its old definition is in the way, for instance under another name
        domain = connection.defineXML(xml)
    create(domain)
    return observe(connection, instance_id)


def create(domain: Any) -> None:
    """Start a domain. Raises libvirtError.

    libvirt makes a tap, and plugs it a moment later: whoever repairs the network in between has plugged it already, which
    libvirt takes for an error (EBUSY) and unmakes everything. Then it is simply done again."""
    for attempt in range(1, CREATE_ATTEMPTS + 1):
        try:
            domain.create()
            return
        except libvirt.libvirtError as error:
            busy = error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR and error.get_int1() == errno.EBUSY
            if not busy or attempt == CREATE_ATTEMPTS:
                raise


def disk_elements(domain: Any) -> list[ET.Element]:
    """The disks that the domain has now, without its cdroms."""
    xml = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))  # noqa: S314 - libvirtd's own text
    return [disk for disk in xml.findall("devices/disk") if disk.get("device", "disk") == "disk"]


def disk_of_file(domain: Any, path: Path) -> ET.Element | None:
    """The domain's disk in this file."""
    for disk in disk_elements(domain):
        source = disk.find("source")
        if source is not None and source.get("file") == str(path):
            return disk
    return None


def refuse_disk_in_use(connection: Any, instance_id: str, path: Path) -> None:
    """Raises HypervisorError when a guest that runs has its disk in this file."""
    domain = find(connection, instance_id)
    if domain is not None and domain.isActive() and disk_of_file(domain, path) is not None:
        raise HypervisorError(reason="the running guest uses the disk")


def resume(connection: Any, instance_id: str) -> GuestState:
    """A paused guest goes on."""
    domain = find(connection, instance_id)
    if domain is not None and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        domain.resume()
    return state_of(domain)


def press_power_button(connection: Any, instance_id: str) -> None:
    """Does nothing to a guest that does not run."""
    domain = find(connection, instance_id)
    if domain is not None:
        _ignoring_not_running(lambda: domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN))


def destroy(connection: Any, instance_id: str) -> GuestState:
    """The guest's process is gone. QEMU is asked first, so that it writes its disks' metadata, then killed."""
    domain = find(connection, instance_id)
    if domain is not None and domain.isActive():
        _ignoring_not_running(domain.destroy)
    return observe(connection, instance_id)


def undefine(connection: Any, instance_id: str) -> None:
    """No definition, saved memory or snapshot metadata of the domain is left."""
    domain = find(connection, instance_id)
    if domain is not None:
        _ignoring_not_running(lambda: domain.undefineFlags(_UNDEFINE_FLAGS))


def _ignoring_not_running(call: Any) -> None:
    try:
        call()
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            raise


def list_ours(connection: Any, cloud_id: str, instance_ids: frozenset[str]) -> dict[str, GuestState]:
    """The domains of our cloud: by their metadata, or by their UUID where somebody removed it."""
    ours: dict[str, GuestState] = {}
    for domain in connection.listAllDomains():
        instance_id = domain.UUIDString()
        if instance_id in instance_ids or is_ours(domain, cloud_id):
            state = state_of(domain)
            if state.exists:
                ours[instance_id] = state
    return ours


def is_ours(domain: Any, cloud_id: str) -> bool:
    """The domain's metadata names our cloud."""
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_URI)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_DOMAIN):
            return False
        raise
    return owner_of(text)[1] == cloud_id
