"""Standalone copies of a disk, written once, straight where the image service wants them. The driver calls it. Where that
is reached by HTTP alone, the copy is written beside the disk and sent.

A guest that is off (or suspended) has its disk converted by qemu-img. One that runs or is paused goes on: QEMU itself
copies the disk as it was when the backup job began. Either way the copy of a call that ended early is removed, and one
that a crash left is written anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree as ET

import libvirt
import structlog

from instar.errors import HypervisorError, ImageGone
from instar.hypervisor.contract import Report
from instar.hypervisor.image_transfer import send
from instar.hypervisor.libvirt import domains
from instar.hypervisor.libvirt.backup_job import BackupGone, abort_backup, has_ended, read_backup
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.devices import live_xml
from instar.hypervisor.libvirt.disks import virtual_size_bytes
from instar.hypervisor.libvirt.host_command import run_copy
from instar.hypervisor.libvirt.host_paths import FULL, HostPaths, disk_full
from instar.hypervisor.libvirt.questions import agent_connected
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.libvirt.write_through import written_through
from instar.model.guest import SnapshotTaken, SnapshotTarget, WorkProgress

FORMATS = ("qcow2", "raw")
POLL_MIN_S, POLL_MAX_S = 0.01, 1.0
POLL_SHARE = 0.05  # of the time that a copy has taken: it is found to be done at most so much later

log = structlog.get_logger()


class Snapshots:
    def __init__(
        self,
        connection: LibvirtConnection,
        paths: HostPaths,
        *,
        settings: LibvirtSettings,
        host: str,
    ) -> None:
        self._connection, self._paths, self._settings, self._host = connection, paths, settings, host

    async def take(self, instance_id: str, disk: str, target: SnapshotTarget, report: Report) -> SnapshotTaken:
        """See the contract. Raises DiskFull, ImageGone (nothing can be written there any more), HypervisorError."""
        source, path = self._paths.disk(instance_id, disk), self._file_of(instance_id, target)
        is_local = urlsplit(target.location).scheme == "file"
        if not await asyncio.to_thread(source.exists):
            raise HypervisorError(reason=f"disk {disk} of the instance does not exist")

        furthest = 0

        def tell(percent: int) -> None:
            nonlocal furthest
            furthest = max(furthest, min(percent if is_local else percent // 2, 99))  # what is sent again goes no way back
            report(WorkProgress(instance_id, furthest))

        try:
            await asyncio.to_thread(_make_room, path, target)
            try:
                copied = await self._back_up(instance_id, source, path, target, tell)
            except BackupGone:
                copied = False  # the guest ended meanwhile: the disk is as it left it
            if not copied:
                await asyncio.to_thread(_make_room, path, target)
                await self._convert(source, path, target, tell)
            size_bytes = (await asyncio.to_thread(path.stat)).st_size
            virtual_bytes = await asyncio.to_thread(virtual_size_bytes, path, target.format)
            if not is_local:
                await self._send(path, target, lambda percent: tell(100 + percent))
                await asyncio.to_thread(path.unlink)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(path.unlink, missing_ok=True))
            raise
        report(WorkProgress(instance_id, 100))
        return SnapshotTaken(size_bytes=size_bytes, virtual_size_bytes=virtual_bytes)

    def _file_of(self, instance_id: str, target: SnapshotTarget) -> Path:
        """Where the copy is written: at once where it is wanted, or beside the disk, to be sent from there."""
        if target.format not in FORMATS:
            raise HypervisorError(
                reason=f"this host writes images as {' or '.join(FORMATS)}, not as {target.format[:40]!r}"
            )
        location = urlsplit(target.location)
        if location.scheme == "file" and location.netloc in ("", "localhost"):
            return Path(unquote(location.path))
        if location.scheme in ("http", "https"):
            return self._paths.instance(instance_id) / "snapshot.part"
        raise HypervisorError(reason=f"this host cannot write image {target.image_id} where it is wanted")

    async def _send(self, path: Path, target: SnapshotTarget, tell: Any) -> None:
        """A thread sends; it is told to stop when the caller is."""
        stop, loop = threading.Event(), asyncio.get_running_loop()
        sending = asyncio.ensure_future(
            asyncio.to_thread(
                send, path, target.location, target.image_id, idle_timeout_s=self._settings.image_idle_timeout_s,
                stop=stop, tell=lambda percent: loop.call_soon_threadsafe(tell, percent),
            )
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._settings.copy_timeout_s):
                await asyncio.shield(sending)
        except TimeoutError as error:
            raise HypervisorError(reason=f"image {target.image_id} could not be sent in time") from error
        finally:
            stop.set()
            await asyncio.wait([sending])

    async def _convert(self, source: Path, path: Path, target: SnapshotTarget, tell: Any) -> None:
        await asyncio.to_thread(_create, path, target)
        # Never compressed: that takes ten times as long as everything else.
        command = ["qemu-img", "convert", "-p", "-f", "qcow2", "-O", target.format, str(source), str(path)]
        async with self._on_disk(path, target):
            await run_copy(command, settings=self._settings, host=self._host, writes_to=path, on_percent=tell)

    async def _back_up(self, instance_id: str, source: Path, path: Path, target: SnapshotTarget, tell: Any) -> bool:
        """The running guest's disk is copied. False where no running guest has it. Raises BackupGone: the guest ended."""
        settings = self._settings
        begin = asyncio.ensure_future(
            self._connection.run(
                lambda connection: _begin(connection, instance_id, source, path, target.format, settings),
                timeout_s=settings.call_timeout_s * 2 + settings.agent_timeout_s * 3,
            )
        )
        try:
            # Shielded: a job that begins although nobody waits for it would have to be found and ended.
            if not await asyncio.shield(begin):
                return False
            async with self._on_disk(path, target):
                await self._until_copied(instance_id, path, tell)
        except BaseException:
            await asyncio.shield(self._abort(instance_id, begin))
            raise
        return True

    async def _abort(self, instance_id: str, begin: asyncio.Future[bool]) -> None:
        await asyncio.wait([begin])
        try:
            await self._connection.run(lambda connection: abort_backup(domains.find(connection, instance_id)))
        except Exception as error:
            log.warning("snapshot.not_aborted", instance=instance_id, error=type(error).__name__)  # the next call does

    async def _until_copied(self, instance_id: str, path: Path, tell: Any) -> None:
        limit_s, began = self._settings.copy_timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    now = await self._connection.run(lambda connection: read_backup(connection, instance_id))
                    if now.complaint is not None:
                        await self._refuse(path, now.complaint)
                    if now.done:
                        return
                    tell(now.percent)
                    taken_s = time.monotonic() - began
                    await asyncio.sleep(min(POLL_MAX_S, max(POLL_MIN_S, taken_s * POLL_SHARE)))
        except TimeoutError as error:
            raise HypervisorError(reason=f"the disk was not copied within {limit_s:g} seconds") from error

    async def _refuse(self, path: Path, complaint: str) -> None:
        """Raises what the end of a job without success means."""
        log.warning("snapshot.failed", complaint=complaint[:1000])
        if any(os.strerror(number) in complaint for number in FULL):
            raise await asyncio.to_thread(disk_full, path, self._host)
        raise HypervisorError(reason="the disk could not be copied")

    @contextlib.asynccontextmanager
    async def _on_disk(self, path: Path, target: SnapshotTarget) -> AsyncIterator[None]:
        """What is written in the block outlives a power failure, and nobody but its owner reads it."""
        try:
            async with written_through(path):
                yield
                await asyncio.to_thread(path.chmod, 0o600)
        except FileNotFoundError as error:
            raise ImageGone(image_id=target.image_id) from error
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(path, self._host) from error
            raise


def _make_room(path: Path, target: SnapshotTarget) -> None:
    """Blocking: nothing is in the way. Raises ImageGone where the place itself is gone."""
    path.unlink(missing_ok=True)
    if not path.parent.is_dir():
        raise ImageGone(image_id=target.image_id)


def _create(path: Path, target: SnapshotTarget) -> None:
    """Blocking: an empty file that nobody but its owner reads, for a program that would make one for everybody."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileNotFoundError as error:
        raise ImageGone(image_id=target.image_id) from error


def _begin(
    connection: Any, instance_id: str, source: Path, path: Path, disk_format: str, settings: LibvirtSettings
) -> bool:
    """The job that copies the disk of a running guest has begun. False when no running guest has it. Blocking."""
    try:
        return _begin_job(connection, instance_id, source, path, disk_format, settings)
    except libvirt.libvirtError:
        if has_ended(connection, instance_id):
            return False
        raise


def _begin_job(
    connection: Any, instance_id: str, source: Path, path: Path, disk_format: str, settings: LibvirtSettings
) -> bool:
    domain = domains.find(connection, instance_id)
    if domain is None or not domain.isActive():
        return False
    abort_backup(domain)
    element = domains.disk_of_file(domain, source)
    target = element.find("target") if element is not None else None
    if target is None:
        return False
    backup = ET.Element("domainbackup", mode="push")
    copy = ET.SubElement(ET.SubElement(backup, "disks"), "disk", name=target.get("dev", ""), type="file")
    ET.SubElement(copy, "target", file=str(path))
    ET.SubElement(copy, "driver", type=disk_format)
    text = ET.tostring(backup, encoding="unicode")
    if not agent_connected(live_xml(domain)):
        domain.backupBegin(text, None, 0)
        return True
    domain.agentSetResponseTimeout(settings.agent_timeout_s)
    try:
        # What the copy holds is decided when the job begins, so the guest is thawed right after.
        _ask_agent(instance_id, "freeze", domain.fsFreeze)
        domain.backupBegin(text, None, 0)
    finally:
        _ask_agent(instance_id, "thaw", domain.fsThaw)
    return True


def _ask_agent(instance_id: str, what: str, call: Any) -> None:
    try:
        call()
    except libvirt.libvirtError as error:
        log.info("snapshot.not_quiesced", instance=instance_id, asked=what, code=error.get_error_code())
