"""`GET /servers/{id}/diagnostics`: what a hypervisor counts of a running guest. For admins.

Before 2.48 the names are the hypervisor's own (a flat object, as clients know it of libvirt), from there on the API's.
"""

from __future__ import annotations

from typing import Any

from instar.api.resource import ApiRoute, Compute
from instar.api.servers.listing import visible_instance
from instar.errors import OperationError, Unavailable
from instar.http.answer import Answer, json_answer
from instar.http.request import Request
from instar.model.guest import GuestDiagnostics, NicDiagnostics
from instar.model.states import PowerState

STANDARD_SINCE = 48
RETRY_S = 5
POWER_NAMES = {
    PowerState.NOSTATE: "pending", PowerState.RUNNING: "running", PowerState.PAUSED: "paused",
    PowerState.SHUTDOWN: "shutdown", PowerState.CRASHED: "crashed", PowerState.SUSPENDED: "suspended",
}  # fmt: skip
_TRAFFIC = tuple(f"{way}_{what}" for way in ("rx", "tx") for what in ("octets", "errors", "drop", "packets"))


class Diagnostics:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        return [ApiRoute("GET", "/servers/{server_id}/diagnostics", "os_compute_api:os-server-diagnostics", self.show)]

    async def show(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        try:
            counted = await self._compute.lifecycle.guests.diagnostics(instance)
        except OperationError as error:  # the host does not answer
            raise Unavailable(retry_after_s=RETRY_S) from error
        return json_answer(standard(counted) if request.microversion >= STANDARD_SINCE else by_device(counted))


def standard(counted: GuestDiagnostics) -> dict[str, Any]:
    """Microversion 2.48; what nobody counts is null. Times are nanoseconds, memory is in MiB."""
    return {
        "state": POWER_NAMES[counted.power_state],
        "driver": counted.driver,
        "hypervisor": counted.hypervisor,
        "hypervisor_os": counted.hypervisor_os,
        "uptime": counted.uptime_s,
        "config_drive": counted.config_drive,
        "num_cpus": len(counted.vcpu_times_ns),
        "num_disks": len(counted.disks),
        "num_nics": len(counted.nics),
        "memory_details": {"maximum": counted.memory_maximum_mib, "used": counted.memory_used_mib},
        "cpu_details": [
            {"id": index, "time": time_ns, "utilisation": None} for index, time_ns in enumerate(counted.vcpu_times_ns)
        ],
        "disk_details": [
            {
                "read_bytes": disk.read_bytes, "read_requests": disk.read_requests, "write_bytes": disk.write_bytes,
                "write_requests": disk.write_requests, "errors_count": disk.errors_count,
            }
            for disk in counted.disks
        ],
        "nic_details": [_nic(nic) for nic in counted.nics],
    }  # fmt: skip


def _nic(nic: NicDiagnostics) -> dict[str, Any]:
    counters = {name: getattr(nic, name) for name in _TRAFFIC}
    return {"mac_address": nic.mac_address, **counters, "rx_rate": None, "tx_rate": None}


def by_device(counted: GuestDiagnostics) -> dict[str, Any]:
    """Before 2.48: one flat object, named by device. Memory in KiB; what nobody counts is left out."""
    found: dict[str, Any] = {f"cpu{index}_time": time_ns for index, time_ns in enumerate(counted.vcpu_times_ns)}
    for index, disk in enumerate(counted.disks):
        name = f"vd{chr(ord('a') + index)}" if index < 26 else f"disk{index}"
        found |= {
            f"{name}_read": disk.read_bytes, f"{name}_read_req": disk.read_requests, f"{name}_write": disk.write_bytes,
            f"{name}_write_req": disk.write_requests, f"{name}_errors": disk.errors_count,
        }  # fmt: skip
    for index, nic in enumerate(counted.nics):
        for way in ("rx", "tx"):
            found[f"vnet{index}_{way}"] = getattr(nic, f"{way}_octets")
            for what in ("packets", "errors", "drop"):
                found[f"vnet{index}_{way}_{what}"] = getattr(nic, f"{way}_{what}")
    for name, mib in (("memory", counted.memory_maximum_mib), ("memory-actual", counted.memory_used_mib)):
        found[name] = None if mib is None else mib * 1024
    return {name: value for name, value in found.items() if value is not None}
