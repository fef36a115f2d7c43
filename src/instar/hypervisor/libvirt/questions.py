"""What is asked of a guest and of its host: what the hypervisor counts, what its agent does. The driver calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import msgspec

from instar.errors import GuestAgentMissing, HypervisorError
from instar.hypervisor.libvirt import domains
from instar.hypervisor.libvirt.devices import live_xml
from instar.hypervisor.libvirt.domain_xml import AGENT_CHANNEL
from instar.hypervisor.libvirt.guest_process import uptime_s
from instar.model.guest import DiskDiagnostics, GuestDiagnostics, NicDiagnostics
from instar.model.states import PowerState

_NO_AGENT = frozenset(
    {
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
        libvirt.VIR_ERR_AGENT_UNSYNCED,
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
        libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
        libvirt.VIR_ERR_OPERATION_INVALID,
    }
)
_NO_COMMAND = ("has not been found", "not found", "has been disabled")  # what an agent says of a command it lacks
_NIC_COUNTERS = (
    "rx_octets", "rx_packets", "rx_errors", "rx_drop", "tx_octets", "tx_packets", "tx_errors", "tx_drop",
)  # fmt: skip


class HostCapabilities(msgspec.Struct, frozen=True):
    """What does not change while a connection lasts."""

    arch: str
    cpu_model: str
    cpu_features: tuple[str, ...]
    hypervisor_version: int


def read_capabilities(connection: Any) -> HostCapabilities:
    """Blocking."""
    capabilities = ET.fromstring(connection.getCapabilities())  # noqa: S314 - libvirtd's own text
    cpu = capabilities.find("host/cpu")
    if cpu is None:
        return HostCapabilities("x86_64", "", (), connection.getVersion())
    return HostCapabilities(
        arch=cpu.findtext("arch", "x86_64"),
        cpu_model=cpu.findtext("model", ""),
        cpu_features=tuple(sorted(feature.get("name", "") for feature in cpu.findall("feature"))),
        hypervisor_version=connection.getVersion(),
    )


def agent_connected(live: ET.Element) -> bool:
    """A guest agent has opened its channel."""
    target = live.find(f"devices/channel/target[@name='{AGENT_CHANNEL}']")
    return target is not None and target.get("state") == "connected"


def has_guest_agent(connection: Any, instance_id: str) -> bool:
    """The guest runs, and its agent has opened the channel. Blocking."""
    domain = domains.find(connection, instance_id)
    if domain is None or domains.state_of(domain).power_state != PowerState.RUNNING:
        return False
    try:
        return agent_connected(live_xml(domain))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return False
        raise


def set_password(connection: Any, instance_id: str, user: str, password: str, *, agent_timeout_s: int) -> None:
    """The guest's agent gives the user this password. Blocking. Raises GuestAgentMissing; HypervisorError when the agent
    tried and failed."""
    missing = GuestAgentMissing(id=instance_id, what="set passwords")
    domain = domains.find(connection, instance_id)
    if domain is None or domains.state_of(domain).power_state != PowerState.RUNNING:
        raise missing
    try:
        if not agent_connected(live_xml(domain)):
            raise missing
        domain.agentSetResponseTimeout(agent_timeout_s)
        domain.setUserPassword(user, password)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise missing from None
        text = str(error.get_error_message())
        if "guest-set-user-password" in text and not any(words in text for words in _NO_COMMAND):
            raise HypervisorError(reason="the guest's agent could not set the password") from None
        if error.get_error_code() in _NO_AGENT or any(words in text for words in _NO_COMMAND):
            raise missing from None
        raise


def diagnostics(connection: Any, instance_id: str, *, virt_type: str) -> GuestDiagnostics:
    """Blocking. Raises HypervisorError for a guest that does not run."""
    domain = domains.find(connection, instance_id)
    state = domains.state_of(domain)
    if domain is None or state.domain_id is None:
        raise HypervisorError(reason="the guest does not run, nothing is counted of it")
    live = live_xml(domain)
    memory: Mapping[str, int] = domain.memoryStats()
    _state, memory_max_kib, memory_kib, _vcpus, _time = domain.info()
    used_kib = memory["available"] - memory["unused"] if {"available", "unused"} <= memory.keys() else memory_kib
    return GuestDiagnostics(
        power_state=state.power_state,
        driver="libvirt",
        hypervisor=virt_type,
        uptime_s=uptime_s(instance_id),
        vcpu_times_ns=tuple(int(vcpu[2]) for vcpu in domain.vcpus()[0]),
        memory_maximum_mib=int(memory_max_kib) >> 10,
        memory_used_mib=int(used_kib) >> 10,
        nics=tuple(_nic(domain, nic) for nic in live.findall("devices/interface")),
        disks=tuple(_disk(domain, disk) for disk in domains.disk_elements(domain)),
        config_drive=live.find("devices/disk[@device='cdrom']") is not None,
    )


def _nic(domain: Any, nic: ET.Element) -> NicDiagnostics:
    mac, target = nic.find("mac"), nic.find("target")
    address = mac.get("address", "") if mac is not None else ""
    try:
        counted = domain.interfaceStats(target.get("dev", "") if target is not None else "")
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return NicDiagnostics(address)  # its tap is gone
    values = {name: value if value >= 0 else None for name, value in zip(_NIC_COUNTERS, counted, strict=True)}
    return NicDiagnostics(address, **values)


def _disk(domain: Any, disk: ET.Element) -> DiskDiagnostics:
    target = disk.find("target")
    counted = domain.blockStats(target.get("dev", "") if target is not None else "")
    read_requests, read_bytes, write_requests, write_bytes, errors = (
        value if value >= 0 else None for value in counted
    )
    return DiskDiagnostics(read_bytes, read_requests, write_bytes, write_requests, errors)
