"""Another volume in the place of one that a running guest has: QEMU copies the data, and then the guest is on the new one.

The driver calls it. A copy that an earlier call began and did not end is ended, and begun anew.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import msgspec
import structlog

from instar.errors import HypervisorError, OperationError
from instar.hypervisor.contract import Report
from instar.hypervisor.libvirt import domains
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.device_xml import add_volume_source
from instar.hypervisor.libvirt.devices import alias_of, device_of_volume, live_xml, name_volume
from instar.hypervisor.libvirt.memory import source_key
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.libvirt.volume_reach import VolumeReach
from instar.model.guest import WorkProgress
from instar.model.volume import VolumeDisk

ABORT_TIMEOUT_S = 10.0
POLL_FIRST_S = 0.05
POLL_MAX_S = 1.0

log = structlog.get_logger()


class _Copy(msgspec.Struct, frozen=True):
    """`ready`: the two volumes are the same, and stay so."""

    percent: int
    ready: bool


class VolumeSwap:
    def __init__(self, connection: LibvirtConnection, reach: VolumeReach, *, settings: LibvirtSettings) -> None:
        self._connection, self._reach, self._settings = connection, reach, settings

    async def swap(self, instance_id: str, old_volume_id: str, new: VolumeDisk, report: Report) -> None:
        """See the contract. Raises HypervisorError: the guest then still has the old volume."""
        there = await self._reach.volume_from_here(instance_id, new)
        try:
            await self._swap(instance_id, old_volume_id, there, report)
        finally:
            for volume_id in (old_volume_id, new.volume_id):
                await asyncio.shield(self._let_go_unless_used(instance_id, volume_id))
        report(WorkProgress(instance_id, 100))

    async def _let_go_unless_used(self, instance_id: str, volume_id: str) -> None:
        """Whichever of the two the guest is not on. One that cannot be asked keeps both."""
        path = self._reach.socket(instance_id, volume_id)
        try:
            used = await self._connection.run(lambda connection: _uses(connection, instance_id, path))
        except OperationError:
            return
        if not used:
            await self._reach.let_go(instance_id, volume_id)

    async def _swap(self, instance_id: str, old_volume_id: str, new: VolumeDisk, report: Report) -> None:
        begin = asyncio.ensure_future(
            self._connection.run(
                lambda connection: _begin(connection, instance_id, old_volume_id, new),
                timeout_s=self._settings.call_timeout_s + ABORT_TIMEOUT_S,
            )
        )
        try:
            device = await asyncio.shield(begin)
            if device is not None:
                await self._until_ready(instance_id, device, report)
                await self._connection.run(
                    lambda connection: _pivot(connection, instance_id, device, old_volume_id, new)
                )
        except BaseException:
            await asyncio.shield(self._abort(instance_id, begin))
            raise

    async def _until_ready(self, instance_id: str, device: str, report: Report) -> None:
        limit_s, pause_s = self._settings.copy_timeout_s, POLL_FIRST_S
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    copy = await self._connection.run(lambda connection: _look(connection, instance_id, device))
                    if copy.ready:
                        return
                    report(WorkProgress(instance_id, min(copy.percent, 99)))
                    await asyncio.sleep(pause_s)
                    pause_s = min(POLL_MAX_S, pause_s * 1.5)
        except TimeoutError as error:
            raise HypervisorError(reason=f"the volume was not copied within {limit_s:g} seconds") from error

    async def _abort(self, instance_id: str, begin: asyncio.Future[str | None]) -> None:
        await asyncio.wait([begin])
        device = begin.result() if not begin.cancelled() and begin.exception() is None else None
        if device is None:
            return
        try:
            await self._connection.run(lambda connection: _end_copy(domains.find(connection, instance_id), device))
        except Exception as error:
            log.warning("volume_swap.not_aborted", instance=instance_id, error=type(error).__name__)  # the next call does


def _begin(connection: Any, instance_id: str, old_volume_id: str, new: VolumeDisk) -> str | None:
    """The copy has begun: the name of the guest's device. None where the guest has the new volume already. Blocking."""
    domain = domains.find(connection, instance_id)
    if domain is None or not domain.isActive():
        raise HypervisorError(reason="the guest does not run, its volume cannot be swapped")
    live = live_xml(domain)
    disk = device_of_volume(live, old_volume_id)
    if disk is None:
        if device_of_volume(live, new.volume_id) is not None:
            return None
        raise HypervisorError(reason="the guest does not have the volume")
    destination = add_volume_source(ET.Element("devices"), new.connection)
    if _is_on(disk, destination):
        name_volume(domain, live, alias_of(disk), new.volume_id)  # an earlier call came so far
        return None
    target = disk.find("target")
    device = target.get("dev", "") if target is not None else ""
    _end_copy(domain, device)
    flags = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
    domain.blockCopy(device, ET.tostring(destination, encoding="unicode"), {}, flags)
    return device


def _look(connection: Any, instance_id: str, device: str) -> _Copy:
    """Blocking. Raises HypervisorError when the copy or the guest ended."""
    domain = domains.find(connection, instance_id)
    if domain is None or not domain.isActive():
        raise HypervisorError(reason="the guest ended while its volume was copied")
    job = domain.blockJobInfo(device)
    if not job:
        raise HypervisorError(reason="the volume could not be copied")
    percent = 100 * int(job["cur"]) // int(job["end"]) if job["end"] else 0
    for disk in live_xml(domain).findall("devices/disk"):
        if disk.find(f"target[@dev='{device}']") is not None and disk.find("mirror[@ready='yes']") is not None:
            return _Copy(percent, ready=True)
    return _Copy(percent, ready=False)


def _pivot(connection: Any, instance_id: str, device: str, old_volume_id: str, new: VolumeDisk) -> None:
    """The guest is on the new volume. Blocking. Raises HypervisorError when QEMU did not go over to it."""
    domain = connection.lookupByUUIDString(instance_id)
    domain.blockJobAbort(device, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    live = live_xml(domain)
    disk = device_of_volume(live, old_volume_id)
    if disk is None or not _is_on(disk, add_volume_source(ET.Element("devices"), new.connection)):
        raise HypervisorError(reason="the guest did not go over to the new volume")
    name_volume(domain, live, alias_of(disk), new.volume_id)


def _uses(connection: Any, instance_id: str, path: str) -> bool:
    """The running guest has something at this socket. Blocking."""
    domain = domains.find(connection, instance_id)
    if domain is None or not domain.isActive():
        return False
    return any(host.get("socket") == path for host in live_xml(domain).iter("host"))


def _end_copy(domain: Any | None, device: str) -> None:
    """No copy of this device runs, and the guest stays where it is. Blocking. Raises HypervisorError."""
    deadline = time.monotonic() + ABORT_TIMEOUT_S
    while domain is not None and domain.isActive() and domain.blockJobInfo(device):
        if time.monotonic() > deadline:
            raise HypervisorError(reason="an earlier copy of the volume does not end")
        try:
            domain.blockJobAbort(device)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_INVALID_ARG):
                raise  # anything but: it ended in this moment
            time.sleep(POLL_FIRST_S)


def _is_on(disk: ET.Element, other: ET.Element) -> bool:
    """Both disks have their data in the same place."""
    mine, theirs = disk.find("source"), other.find("source")
    return mine is not None and theirs is not None and source_key(mine) == source_key(theirs)
