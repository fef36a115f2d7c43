"""The slow work: data that is made, copied, grown, sent to the image service, deleted. Called by `local.py` and the API.

What is to be done stands in the record (`work`) before it begins, and goes from it in the same transaction as the status
that says how it ended: after a crash at any point the work is simply done again, from the start. Each kind makes its data
beside what is there and then puts it into place, so it can be.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog

from instar.config import VolumeSettings
from instar.errors import InstarError, VolumeFailed
from instar.store import volumes as sql
from instar.store.contract import Statement, Store
from instar.store.volumes import SnapshotRecord, VolumeRecord, Work
from instar.volumes.exports import Exports
from instar.volumes.files import GIB, VolumeFiles
from instar.volumes.images import VolumeImages

log = structlog.get_logger()

_QUICK = frozenset({"delete", "extend"})


class Jobs:
    """One job at a time for each volume or snapshot; `copies_max` that move data at once."""

    def __init__(
        self, store: Store, files: VolumeFiles, exports: Exports, images: VolumeImages, settings: VolumeSettings
    ) -> None:
        self._store = store
        self._files = files
        self._exports = exports
        self._images = images
        self._deadline_s = settings.copy_deadline_s
        self._copying = asyncio.Semaphore(settings.copies_max)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def resume(self) -> None:
        """At start: everything that a killed process left undone begins again."""
        for snapshot in await sql.snapshots_with_work(self._store):
            log.info("volumes.resumed", snapshot=snapshot.id, work=snapshot.work and snapshot.work.kind)
            self.start_snapshot(snapshot.id)
        for volume in await sql.volumes_with_work(self._store):
            log.info("volumes.resumed", volume=volume.id, work=volume.work and volume.work.kind)
            self.start_volume(volume.id)

    async def close(self) -> None:
        """The programs end; what they did is done again at the next start."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def start_volume(self, volume_id: str) -> None:
        """Do what the volume's record says is to be done."""
        self._start(volume_id, self._volume(volume_id))

    def start_snapshot(self, snapshot_id: str) -> None:
        self._start(snapshot_id, self._snapshot(snapshot_id))

    async def wait(self, record_id: str) -> None:
        """Until the job of this volume or snapshot has ended, however; at once where there is none."""
        task = self._tasks.get(record_id)
        if task is not None:
            await asyncio.wait([task])

    async def cancel(self, record_id: str) -> None:
        """Its job has ended, half done perhaps; the record still says what is to be done."""
        task = self._tasks.get(record_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _start(self, record_id: str, job: Coroutine[None, None, None]) -> None:
        before = self._tasks.get(record_id)

        async def in_turn() -> None:
            try:
                if before is not None:
                    await asyncio.wait([before])
            except asyncio.CancelledError:
                job.close()
                raise
            await job

        task = asyncio.create_task(in_turn(), name=f"volume work {record_id}")
        self._tasks[record_id] = task
        task.add_done_callback(lambda ended: self._forget(record_id, ended))

    def _forget(self, record_id: str, ended: asyncio.Task[None]) -> None:
        if self._tasks.get(record_id) is ended:
            del self._tasks[record_id]
        if not ended.cancelled() and ended.exception() is not None:
            log.error("volumes.job_lost", subject=record_id, reason=repr(ended.exception()))

    # --- volumes ------------------------------------------------------------------------------------------------------

    async def _volume(self, volume_id: str) -> None:
        record = await sql.volume_fetch(self._store, volume_id)
        if record is None or record.work is None:
            return
        work = record.work
        turn = contextlib.nullcontext() if work.kind in _QUICK else self._copying
        try:
            async with turn:
                await self._do(record, work)
        except Exception as error:
            reason = error.message if isinstance(error, InstarError) else repr(error)
            log.error("volume.work_failed", volume=volume_id, work=work.kind, reason=reason)
            await self._store.write(_failed(record, work))
            if work.kind == "upload":
                await self._images.image_drop(work.image_id)

    async def _do(self, record: VolumeRecord, work: Work) -> None:
        match work.kind:
            case "create":
                await self._create(record)
            case "delete":
                await self._delete(record)
            case "extend":
                await self._exports.resize(record.id, record.size_gib * GIB)
                await self._store.write(sql.volume_work_done(record.id, None))
            case "upload":
                await self._upload(record, work)
            case "revert":
                await self._from(self._files.snapshot(work.snapshot_id), "qcow2", record)
                await self._store.write(sql.volume_work_done(record.id, None))
            case _:
                raise VolumeFailed(volume_id=record.id, reason=f"nobody knows the work {work.kind}")

    async def _create(self, record: VolumeRecord) -> None:
        if record.image_id is not None:
            source = await self._images.image_source(record.image_id)
            await self._from(Path(unquote(urlsplit(source.location).path)), source.format, record)
        elif record.snapshot_id is not None:
            await self._from(self._files.snapshot(record.snapshot_id), "qcow2", record)
        else:
            made = self._files.new()
            try:
                if record.source_volume_id is not None:
                    await self._exports.copy(record.source_volume_id, made, self._deadline_s)
                    await self._files.resize(made, record.size_gib * GIB)
                else:
                    await self._files.create(made, record.size_gib * GIB)
                await self._files.place(made, self._files.volume(record.id))
            finally:
                await self._files.remove(made)
        await self._store.write(sql.volume_work_done(record.id, "available"))
        log.info("volume.made", volume=record.id, size_gib=record.size_gib)

    async def _from(self, source: Path, source_format: str, record: VolumeRecord) -> None:
        """The volume's file is a copy of this one, which nobody writes to, grown to the volume's size."""
        made = self._files.new()
        try:
            await self._files.convert(source, source_format, made, "qcow2", self._deadline_s)
            await self._files.resize(made, record.size_gib * GIB)
            await self._files.place(made, self._files.volume(record.id))
        finally:
            await self._files.remove(made)

    async def _delete(self, record: VolumeRecord) -> None:
        await self._exports.until_idle(record.id)
        await self._exports.stop(record.id)
        await self._files.remove(self._files.volume(record.id))
        await self._store.write(sql.volume_delete(record.id))
        log.info("volume.deleted", volume=record.id)

    async def _upload(self, record: VolumeRecord, work: Work) -> None:
        """A volume that nobody has open is read where it is; another one is copied first, so that the image is of one
        moment."""
        source, copy, converted = self._files.volume(record.id), self._files.new(), self._files.new()
        try:
            if record.status_before != "available":
                await self._exports.copy(record.id, copy, self._deadline_s)
                source = copy
            if work.disk_format != "qcow2":
                await self._files.convert(source, "qcow2", converted, work.disk_format, self._deadline_s)
                source = converted
            await self._images.image_fill(work.image_id, source)
        finally:
            await self._files.remove(copy)
            await self._files.remove(converted)
        await self._store.write(sql.volume_work_done(record.id, None))

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def _snapshot(self, snapshot_id: str) -> None:
        record = await sql.snapshot_fetch(self._store, snapshot_id)
        if record is None or record.work is None:
            return
        try:
            if record.work.kind == "delete":
                await self._files.remove(self._files.snapshot(snapshot_id))
                await self._store.write(sql.snapshot_delete(snapshot_id))
                return
            async with self._copying:
                await self._snapshot_create(record)
        except Exception as error:
            reason = error.message if isinstance(error, InstarError) else repr(error)
            log.error("snapshot.work_failed", snapshot=snapshot_id, work=record.work.kind, reason=reason)
            failed = "error_deleting" if record.work.kind == "delete" else "error"
            await self._store.write(sql.snapshot_work_done(snapshot_id, failed))

    async def _snapshot_create(self, record: SnapshotRecord) -> None:
        made = self._files.new()
        try:
            await self._exports.copy(record.volume_id, made, self._deadline_s)
            await self._files.place(made, self._files.snapshot(record.id))
        finally:
            await self._files.remove(made)
        await self._store.write(sql.snapshot_work_done(record.id, "available"))


def _failed(record: VolumeRecord, work: Work) -> Statement:
    """How a volume stands when its work failed: as before, where what it had is untouched."""
    match work.kind:
        case "create":
            return sql.volume_work_done(record.id, "error")
        case "delete":
            return sql.volume_work_done(record.id, "error_deleting")
        case "extend":
            return sql.volume_work_done(record.id, "error_extending", size_gib=work.size_gib)
        case _:
            return sql.volume_work_done(record.id, None)
