"""The job by which QEMU copies a disk of a running guest: how far it is, how it ended, and its end before its time."""

from __future__ import annotations

import time
from typing import Any

import libvirt
import msgspec

from instar.errors import HypervisorError
from instar.hypervisor.libvirt import domains

ABORT_TIMEOUT_S = 10.0
END_TIMEOUT_S = 1.0
POLL_S = 0.05


class BackupGone(Exception):
    """The guest ended, and the job with it."""


class BackupState(msgspec.Struct, frozen=True):
    """`complaint`: it ended without success."""

    percent: int = 0
    done: bool = False
    complaint: str | None = None


def read_backup(connection: Any, instance_id: str) -> BackupState:
    """How far the job is. Blocking. Raises BackupGone."""
    try:
        return _read(connection, instance_id)
    except libvirt.libvirtError:
        if has_ended(connection, instance_id):
            raise BackupGone from None
        raise


def has_ended(connection: Any, instance_id: str) -> bool:
    """The guest does not run, or ends in this moment: libvirt cannot talk to it some time before it says so. Blocking."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while domains.observe(connection, instance_id).domain_id is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _read(connection: Any, instance_id: str) -> BackupState:
    domain = domains.find(connection, instance_id)
    if domain is None or not domain.isActive():
        raise BackupGone
    stats = domain.jobStats()
    if stats["type"] != libvirt.VIR_DOMAIN_JOB_NONE:
        total = stats.get("disk_total", 0)
        return BackupState(percent=100 * stats.get("disk_processed", 0) // total if total else 0)
    ended = domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
    if ended["type"] == libvirt.VIR_DOMAIN_JOB_COMPLETED:
        return BackupState(percent=100, done=True)
    if has_ended(connection, instance_id):
        raise BackupGone
    return BackupState(complaint=str(ended.get("errmsg") or "it ended without saying why"))


def abort_backup(domain: Any | None) -> None:
    """No such job runs any more. Blocking. Raises HypervisorError when it does not end."""
    deadline = time.monotonic() + ABORT_TIMEOUT_S
    while _runs(domain):
        if time.monotonic() > deadline:
            raise HypervisorError(reason="an earlier copy of the guest's disk does not end")
        try:
            if domain is not None:
                domain.abortJob()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                raise  # anything but: it ended in this moment
        time.sleep(POLL_S)


def _runs(domain: Any | None) -> bool:
    if domain is None or not domain.isActive():
        return False
    stats = domain.jobStats()
    is_backup = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
    return bool(is_backup and stats["type"] != libvirt.VIR_DOMAIN_JOB_NONE)
