"""The slow work: data that is made, copied, grown, sent to the image service, deleted. Called by `owner.py`.

What is to be done stands in the record (`work`) before it begins, and goes from it in the same transaction as the status
that says how it ended: after a crash at any point the work is simply done again, from the start. Each kind makes its data
beside what is there and then puts it into place, so it can be. Where the record says something else by now (a delete of
what is being made), the work at hand ends and the other begins.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
import structlog

from instar.config import VolumeSettings
from instar.errors import Conflict, InstarError, NotFound, VolumeFailed
from instar.model.storage import StorageSubject
from instar.store import volume_snapshots as snapshot_sql
from instar.store import volumes as sql
from instar.store.contract import Statement, Store
from instar.store.volume_records import SnapshotRecord, VolumeRecord, Work
from instar.volumes.creation import image_metadata
from instar.volumes.exports import Exports
from instar.volumes.files import GIB, VolumeFiles
from instar.volumes.images import VolumeImages
from instar.volumes.storage import snapshot_subject, volume_subject

log = structlog.get_logger()

_QUICK = frozenset({"delete", "extend", "reimage-undo", "reimage-end"})


class _Runner(NamedTuple):
    """`again`: the record is to be looked at once more."""

    task: asyncio.Task[None]
    again: asyncio.Event


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
        self._runners: dict[StorageSubject, _Runner] = {}

    async def look(self) -> None:
        """Everything that is to be done is being done: also what a killed process left undone."""
        for snapshot in await snapshot_sql.snapshots_with_work(self._store):
            self._look_at(snapshot_subject(snapshot.id), snapshot.work)
        for volume in await sql.volumes_with_work(self._store):
            self._look_at(volume_subject(volume.id), volume.work)

    def _look_at(self, subject: StorageSubject, work: Work | None) -> None:
        if subject not in self._runners:
            log.info("volumes.resumed", subject=subject.id, work=work and work.kind)
            self.wake(subject)

    async def close(self) -> None:
        """The programs end; what they did is done again at the next start."""
        tasks = [runner.task for runner in self._runners.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self, subject: StorageSubject) -> None:
        """Do what the record says is to be done by now, and nothing else."""
        runner = self._runners.get(subject)
        if runner is not None:
            runner.again.set()
            return
        again = asyncio.Event()
        task = asyncio.create_task(self._run(subject, again), name=f"volume work {subject.id}")
        self._runners[subject] = _Runner(task, again)
        task.add_done_callback(lambda ended: self._forget(subject, ended))

    async def ended(self, subject: StorageSubject) -> None:
        """Waits until nothing is at work on this volume or snapshot."""
        while (runner := self._runners.get(subject)) is not None:
            await asyncio.wait([runner.task])
            await asyncio.sleep(0)  # its end is noted on the loop

    async def _run(self, subject: StorageSubject, again: asyncio.Event) -> None:
        """Until the record says that there is nothing to do."""
        done: Work | None = None
        while True:
            again.clear()
            record = await self._read(subject)
            work = record.work if record is not None else None
            if record is None or work is None:
                if again.is_set():
                    continue
                return
            if work == done:
                log.error("volumes.work_stays", subject=subject.id, work=work.kind)  # its end could not be written
                return
            if await self._carried_out(subject, record, again):
                done = work
            elif work.kind == "upload":
                await self._images.image_drop(work.image_id)

    async def _carried_out(
        self, subject: StorageSubject, record: VolumeRecord | SnapshotRecord, again: asyncio.Event
    ) -> bool:
        """False: ended early, because the record says something else by now."""
        job = asyncio.ensure_future(
            self._volume(record) if isinstance(record, VolumeRecord) else self._snapshot(record)
        )
        woken: asyncio.Task[bool] | None = None
        try:
            while not job.done():
                woken = woken or asyncio.ensure_future(again.wait())
                await asyncio.wait({job, woken}, return_when=asyncio.FIRST_COMPLETED)
                if job.done() or not woken.done():
                    continue
                woken = None
                again.clear()
                now = await self._read(subject)
                if now is None or now.work != record.work:
                    return False
            await job
            return True
        finally:
            if woken is not None:
                woken.cancel()
            if not job.done():
                job.cancel()
                await asyncio.wait({job})

    async def _read(self, subject: StorageSubject) -> VolumeRecord | SnapshotRecord | None:
        fetch = sql.volume_fetch if subject.kind == "volume" else snapshot_sql.snapshot_fetch
        return await fetch(self._store, subject.id)

    def _forget(self, subject: StorageSubject, ended: asyncio.Task[None]) -> None:
        runner = self._runners.pop(subject, None)
        if ended.cancelled():
            return
        if ended.exception() is not None:
            log.error("volumes.job_lost", subject=subject.id, reason=repr(ended.exception()))
        elif runner is not None and runner.again.is_set():
            self.wake(subject)  # somebody asked between its last look and its end

    # --- volumes ------------------------------------------------------------------------------------------------------

    async def _volume(self, record: VolumeRecord) -> None:
        work = record.work
        assert work is not None, "looked at by the caller"
        turn = contextlib.nullcontext() if work.kind in _QUICK else self._copying
        try:
            async with turn:
                await self._do(record, work)
        except Exception as error:
            reason = error.message if isinstance(error, InstarError) else repr(error)
            log.error("volume.work_failed", volume=record.id, work=work.kind, reason=reason)
            await self._store.write(_failed(record, work))
            if work.kind == "upload":
                await self._images.image_drop(work.image_id)

    async def _do(self, record: VolumeRecord, work: Work) -> None:
        match work.kind:
            case "create":
                await self._create(record, work)
            case "delete":
                await self._delete(record)
            case "extend":
                await self._exports.resize(record.id, record.size_gib * GIB)
                await self._store.write(sql.volume_work_done(record.id, work, None))
            case "upload":
                await self._upload(record, work)
            case "revert":
                await self._from(self._files.snapshot(work.snapshot_id), "qcow2", record)
                await self._store.write(sql.volume_work_done(record.id, work, None))
            case "reimage":
                await self._reimage(record, work)
            case "reimage-undo":
                await self._reimage_undo(record, work)
            case "reimage-end":
                await self._reimage_end(record, work)
            case _:
                raise VolumeFailed(volume_id=record.id, reason=f"nobody knows the work {work.kind}")

    async def _create(self, record: VolumeRecord, work: Work) -> None:
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
        await self._store.write(sql.volume_work_done(record.id, work, "available"))
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

    # What a rebuild does (`reimage.py`). The old data has a second name before the new data takes the first.

    async def _reimage(self, record: VolumeRecord, work: Work) -> None:
        source = await self._images.image_source(work.image_id)
        volume, made = self._files.volume(record.id), self._files.new()
        await self._exports.until_idle(record.id)
        await self._exports.stop(record.id)
        try:
            await self._files.convert(
                Path(unquote(urlsplit(source.location).path)), source.format, made, "qcow2", self._deadline_s
            )
            await self._files.resize(made, record.size_gib * GIB)
            await self._files.keep(volume, self._files.kept(record.id, work.turn))
            await self._files.place(made, volume)
        finally:
            await self._files.remove(made)
        await self._end_reimage(record, work, reimaged=work.turn)

    async def _reimage_undo(self, record: VolumeRecord, work: Work) -> None:
        kept = self._files.kept(record.id, work.turn)
        if await self._files.exists(kept):
            await self._exports.until_idle(record.id)
            await self._exports.stop(record.id)
            await self._files.place(kept, self._files.volume(record.id))
            await self._files.remove(kept)  # still there where it was only a second name of the same data
        await self._end_reimage(record, work, reimaged="")

    async def _reimage_end(self, record: VolumeRecord, work: Work) -> None:
        await self._files.forget_kept(record.id)
        try:
            image = await self._images.image_fetch(work.image_id, project_id="", is_admin=True)
        except NotFound:  # deleted meanwhile: the volume remembers the one before
            await self._end_reimage(record, work, reimaged="")
        else:
            await self._end_reimage(record, work, reimaged="", image_metadata=image_metadata(image))

    async def _end_reimage(self, record: VolumeRecord, work: Work, **document: object) -> None:
        """Again, where a user changes the volume's metadata at the same time."""
        now: VolumeRecord | None = record
        while now is not None:
            changed = msgspec.structs.replace(now.document, **document)
            clash = Conflict(f"Volume {record.id} is being changed by others.")
            try:
                await self._store.write(
                    sql.volume_document(now, changed, clash), sql.volume_work_done(record.id, work, None)
                )
                return
            except Conflict as error:
                if error is not clash:
                    raise
                now = await sql.volume_fetch(self._store, record.id)

    async def _delete(self, record: VolumeRecord) -> None:
        await self._exports.until_idle(record.id)
        await self._exports.stop(record.id)
        await self._files.forget_kept(record.id)
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
        await self._store.write(sql.volume_work_done(record.id, work, None))

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def _snapshot(self, record: SnapshotRecord) -> None:
        work = record.work
        assert work is not None, "looked at by the caller"
        try:
            if work.kind == "delete":
                await self._files.remove(self._files.snapshot(record.id))
                await self._store.write(snapshot_sql.snapshot_delete(record.id))
                return
            async with self._copying:
                await self._snapshot_create(record, work)
        except Exception as error:
            reason = error.message if isinstance(error, InstarError) else repr(error)
            log.error("snapshot.work_failed", snapshot=record.id, work=work.kind, reason=reason)
            failed = "error_deleting" if work.kind == "delete" else "error"
            await self._store.write(snapshot_sql.snapshot_work_done(record.id, work, failed))

    async def _snapshot_create(self, record: SnapshotRecord, work: Work) -> None:
        made = self._files.new()
        try:
            await self._exports.copy(record.volume_id, made, self._deadline_s)
            await self._files.place(made, self._files.snapshot(record.id))
        finally:
            await self._files.remove(made)
        await self._store.write(snapshot_sql.snapshot_work_done(record.id, work, "available"))


def _failed(record: VolumeRecord, work: Work) -> Statement:
    """How a volume stands when its work failed: as before, where what it had is untouched."""
    match work.kind:
        case "create":
            return sql.volume_work_done(record.id, work, "error")
        case "delete":
            return sql.volume_work_done(record.id, work, "error_deleting")
        case "extend":
            return sql.volume_work_done(record.id, work, "error_extending", size_gib=work.size_gib)
        case _:
            return sql.volume_work_done(record.id, work, None)
