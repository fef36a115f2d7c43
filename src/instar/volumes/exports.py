"""Which volumes are served, and by which process: started, adopted, watched, restarted, ended. Called by `owner.py`.

A process runs while its volume is wanted (it has attachments that are connected) or is being copied. It is watched, and
started again under the same names when it dies by itself: a guest's QEMU connects again and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import structlog

from instar.errors import VolumeFailed
from instar.model.volume import VolumeConnection
from instar.nbd.making import to_its_end
from instar.nbd.monitor import MonitorError
from instar.nbd.place import ensure_place
from instar.store.volume_records import AttachmentRecord, VolumeRecord
from instar.volumes.export_process import ExportProcess, export_volumes
from instar.volumes.files import VolumeFiles
from instar.volumes.gateways import Gateways

log = structlog.get_logger()

COPY_POLL_MAX_S = 0.5
RESTART_PAUSE_S = 0.2
RESTART_PAUSE_MAX_S = 10.0
STABLE_S = 10.0  # a process that lived so long died of something new


class _Served:
    """One volume that has a process. `names`: what it is exported as → writable."""

    def __init__(self, process: ExportProcess) -> None:
        self.process = process
        self.lock = asyncio.Lock()  # the process is changed by one at a time
        self.names: dict[str, bool] = {}
        self.copies = 0
        self.idle = asyncio.Event()  # no copies
        self.idle.set()
        self.pid = 0
        self.pid_descriptor: int | None = None
        self.started_at = 0.0
        self.pause_s = RESTART_PAUSE_S


class Exports:
    """`runtime` is a directory of our own, with a path short enough for sockets."""

    def __init__(self, runtime: Path, files: VolumeFiles, gateways: Gateways) -> None:
        self._runtime = runtime
        self._files = files
        self._gateways = gateways
        self._served: dict[str, _Served] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, wanted: Mapping[str, Mapping[str, bool]]) -> None:
        """What an earlier process left is taken over: `wanted` (volume id → name → writable) goes on or starts, all else
        ends, copies too. A volume that cannot be served is tried again and again."""
        for volume_id in await asyncio.to_thread(export_volumes, self._runtime):
            process = ExportProcess(self._runtime, volume_id)
            if volume_id not in wanted or await asyncio.to_thread(process.pid) is None:
                await asyncio.to_thread(process.end)
                continue
            try:
                await asyncio.to_thread(process.copies_end)
            except MonitorError as error:
                log.warning("export.not_adopted", volume=volume_id, reason=error.message)
                await asyncio.to_thread(process.end)
        for volume_id, names in wanted.items():
            served = self._of(volume_id)
            served.names = dict(names)
            try:
                async with served.lock:
                    await self._ensure(volume_id, served)
            except MonitorError as error:
                log.error("export.not_started", volume=volume_id, reason=error.message)
                self._bring_back(volume_id, served)
        await self._gateways.open()

    async def close(self) -> None:
        """Nobody is watched any more. The processes go on."""
        await self._gateways.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for served in self._served.values():
            self._unwatch(served)

    # --- what is asked ------------------------------------------------------------------------------------------------

    async def serve(self, volume: VolumeRecord, attachment: AttachmentRecord, *, host_ip: str) -> VolumeConnection:
        """The attachment's host can reach the volume. Raises VolumeFailed."""
        name, writable = export_name(volume, attachment)
        afar = await self._gateways.are_needed(host_ip)
        async with self._held(volume.id) as served:
            before = dict(served.names)
            served.names[name] = writable
            if afar:
                served.names[volume.export] = True  # the gateway's own
            try:
                size_bytes = await self._ensure(volume.id, served)
                path = str(served.process.socket)
                gateway = (
                    await self._gateways.offer(volume, attachment, path, size_bytes=size_bytes, host_ip=host_ip)
                    if afar
                    else None
                )
            except MonitorError as error:
                served.names = before
                raise _failed(volume.id, error) from error
            except VolumeFailed:
                served.names = before
                raise
            place = await asyncio.to_thread(ensure_place, self._runtime)
        return VolumeConnection(
            export=name, socket=path, size_bytes=size_bytes, read_only=not writable, place=place, gateway=gateway
        )

    async def stop(self, volume_id: str, wanted: Callable[[], Awaitable[set[str]]] | None = None) -> None:
        """Nothing serves the volume any more, unless attachments that have a host are `wanted`: then nobody else is served
        afar. A copy of it may go on. It is asked when nobody else can change that: who wants the volume served must have
        said so there before."""
        async with self._held(volume_id) as served:
            kept = await wanted() if wanted is not None else set()
            await self._gateways.keep_only(volume_id, kept)
            if kept:
                return
            if served.names and served.copies:
                with contextlib.suppress(MonitorError):
                    await asyncio.to_thread(served.process.stop_serving)
            served.names.clear()

    async def served(self) -> list[str]:
        """Volumes that have a process for something else than a copy."""
        found = sorted({*await asyncio.to_thread(export_volumes, self._runtime), *self._gateways.volumes()})
        return [one for one in found if one not in self._served or self._served[one].names]

    async def until_idle(self, volume_id: str) -> None:
        """Waits until no copy is made of the volume."""
        served = self._served.get(volume_id)
        if served is not None:
            await served.idle.wait()

    async def resize(self, volume_id: str, size_bytes: int) -> None:
        """The volume has this size; those who are connected are cut off for a moment, and connect again by themselves.
        Raises VolumeFailed, HypervisorError."""
        async with self._held(volume_id) as served:
            if not served.names and not served.copies:
                await self._files.resize(self._files.volume(volume_id), size_bytes)
                return
            try:
                await asyncio.to_thread(served.process.stop_serving)
                try:
                    await asyncio.to_thread(served.process.resize, size_bytes)
                finally:
                    await self._served_again(volume_id, served)
                await self._gateways.opened_anew(volume_id, size_bytes)
            except MonitorError as error:
                raise _failed(volume_id, error) from error

    async def _served_again(self, volume_id: str, served: _Served) -> None:
        """With the lock held. Raises MonitorError; then it is tried on, for those who were cut off wait."""
        try:
            await self._ensure(volume_id, served)
        except MonitorError:
            self._bring_back(volume_id, served)
            raise

    async def copy(self, volume_id: str, target: Path, deadline_s: float) -> None:
        """The volume as it is now, in a new qcow2 file; whoever has it attached goes on. Raises VolumeFailed."""
        copy_id = uuid.uuid4().hex[:16]  # the name of a block node has 31 characters at most
        async with self._held(volume_id) as served:
            served.copies += 1
            served.idle.clear()
        try:
            try:
                async with served.lock:
                    size_bytes = await self._ensure(volume_id, served)
                await self._files.create(target, size_bytes)
                async with asyncio.timeout(deadline_s):
                    await asyncio.to_thread(served.process.copy_start, copy_id, target)
                    await self._copied(served.process, copy_id)
            except MonitorError as error:
                raise _failed(volume_id, error) from error
            except TimeoutError as error:
                raise VolumeFailed(volume_id=volume_id, reason=f"the copy took more than {deadline_s:g} seconds") from error
        finally:
            await asyncio.shield(self._copy_over(volume_id, served, copy_id))

    async def _copied(self, process: ExportProcess, copy_id: str) -> None:
        pause_s = 0.01
        while not (state := await asyncio.to_thread(process.copy_state, copy_id)).ended:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, COPY_POLL_MAX_S)
        if state.error is not None:
            raise MonitorError(description=state.error)

    async def _copy_over(self, volume_id: str, served: _Served, copy_id: str) -> None:
        with contextlib.suppress(MonitorError):
            await asyncio.to_thread(served.process.copies_end, copy_id)
        async with self._held(volume_id) as same:
            assert same is served
            served.copies -= 1
            if not served.copies:
                served.idle.set()

    # --- processes ----------------------------------------------------------------------------------------------------

    def _of(self, volume_id: str) -> _Served:
        if volume_id not in self._served:
            self._served[volume_id] = _Served(ExportProcess(self._runtime, volume_id))
        return self._served[volume_id]

    @contextlib.asynccontextmanager
    async def _held(self, volume_id: str) -> AsyncIterator[_Served]:
        """The volume's process is ours meanwhile; afterwards it ends where nobody needs it."""
        while True:
            served = self._of(volume_id)
            async with served.lock:
                if self._served.get(volume_id) is not served:
                    continue  # its process was ended while we waited
                try:
                    yield served
                finally:
                    if not served.names and not served.copies:
                        self._unwatch(served)
                        await asyncio.shield(asyncio.to_thread(served.process.end))
                        self._served.pop(volume_id, None)
                return

    async def _ensure(self, volume_id: str, served: _Served) -> int:
        """The process runs, is watched, and serves what is wanted. The size of the volume. With the lock held. Raises
        MonitorError."""
        file, names = self._files.volume(volume_id), dict(served.names)
        running = await to_its_end(partial(served.process.ensure_running, file, names))
        self._watch(volume_id, served, running.pid)
        return running.size_bytes

    def _watch(self, volume_id: str, served: _Served, pid: int) -> None:
        if served.pid_descriptor is not None and served.pid == pid:
            return
        self._unwatch(served)
        try:
            served.pid, served.pid_descriptor = pid, os.pidfd_open(pid)
        except ProcessLookupError:
            self._bring_back(volume_id, served)
            return
        served.started_at = time.monotonic()
        loop = asyncio.get_running_loop()
        loop.add_reader(served.pid_descriptor, self._on_end, volume_id, served)

    def _unwatch(self, served: _Served) -> None:
        if served.pid_descriptor is not None:
            asyncio.get_running_loop().remove_reader(served.pid_descriptor)
            os.close(served.pid_descriptor)
            served.pid_descriptor = None

    def _on_end(self, volume_id: str, served: _Served) -> None:
        self._unwatch(served)
        if time.monotonic() - served.started_at >= STABLE_S:
            served.pause_s = RESTART_PAUSE_S
        if served.names:
            log.warning("export.died", volume=volume_id)
            self._bring_back(volume_id, served)

    def _bring_back(self, volume_id: str, served: _Served) -> None:
        task = asyncio.create_task(self._restart(volume_id, served), name=f"restart export {volume_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart(self, volume_id: str, served: _Served) -> None:
        """Until it runs, or nobody wants it any more."""
        while True:
            async with served.lock:
                if not served.names or self._served.get(volume_id) is not served:
                    return
                try:
                    await self._ensure(volume_id, served)
                    log.info("export.restarted", volume=volume_id)
                    return
                except Exception as error:  # whatever it is, guests wait for their data
                    log.error("export.not_restarted", volume=volume_id, reason=str(error))
            await asyncio.sleep(served.pause_s)
            served.pause_s = min(served.pause_s * 2, RESTART_PAUSE_MAX_S)


def export_name(volume: VolumeRecord, attachment: AttachmentRecord) -> tuple[str, bool]:
    """The name under which an attachment finds its volume, and whether it may write."""
    return (f"{volume.export}-ro", False) if attachment.read_only else (volume.export, True)


def _failed(volume_id: str, error: MonitorError) -> VolumeFailed:
    log.error("export.failed", volume=volume_id, reason=error.message)
    return VolumeFailed(volume_id=volume_id, reason="its data cannot be served")
