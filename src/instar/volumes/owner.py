"""The one process that touches volumes' data: files, jobs, exports. In `instar storage`, or inside a cloud of one process.

    owner = VolumeOwner(store, state_dir, settings.volume, images, bus=bus)
    await owner.open()      # after the store, the bus and the images; takes the directory, finishes what was left undone
    await owner.close()     # before them; exports go on, and the next owner adopts them

`images` must be able to read and write images' data (`ImagesForVolumes` over an image service in this process). Without a
`bus` it serves only who calls it directly. The lock on the directory dies with the process; the work is in the database, so
that whoever owns the directory next goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import IO

import msgspec
import structlog

from instar.bus.contract import Bus, Message, Reply, Subscription
from instar.config import VolumeSettings
from instar.errors import InstarError, NotFound, StepFailed
from instar.file_lock import lock_within
from instar.model.storage import STORAGE_QUEUE, LookAt, ReleaseVolume, ServeVolume, StorageSubject, StorageWish, TellServed
from instar.model.volume import VolumeConnection
from instar.nbd.daemon import daemons
from instar.nbd.relay import Relay
from instar.store import volume_attachments as attachment_sql
from instar.store import volume_snapshots as snapshot_sql
from instar.store import volumes as sql
from instar.store.contract import Store
from instar.store.volume_records import AttachmentRecord
from instar.volumes.export_process import end_everything
from instar.volumes.exports import Exports, export_name
from instar.volumes.files import VolumeFiles
from instar.volumes.gateways import Gateways
from instar.volumes.images import VolumeImages
from instar.volumes.jobs import Jobs
from instar.volumes.types import types_bootstrap

log = structlog.get_logger()

LOCK_MAX_S = 20.0  # the owner before this one may take so long to end
WISHES_MAX = 32  # at once
LOOK_EVERY_S = 15.0  # for what was asked while nobody listened
GATEWAYS = "gateways"
_decoder = msgspec.msgpack.Decoder(StorageWish)
_encode = msgspec.msgpack.Encoder().encode


def volumes_runtime(state_dir: Path) -> Path:
    """Where the sockets of a cloud's exports are: a short path, on a file system that a restart of the machine empties."""
    cloud = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:12]
    root = Path("/run")
    if not os.access(root, os.W_OK):
        root = Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"))  # noqa: S108 - the directory below is our own, 0711
    return root / f"instar-volumes-{cloud}"


def remove_exports(state_dir: Path) -> None:
    """No process serves any volume of a cloud that does not run. Blocking. Volumes themselves stay."""
    runtime = volumes_runtime(state_dir)
    for name in daemons(runtime / GATEWAYS):
        Relay(runtime / GATEWAYS, name).end()
    end_everything(runtime)


class VolumeOwner:
    """Implements `Storage`. Call `open` before anything else."""

    def __init__(
        self,
        store: Store,
        state_dir: Path,
        settings: VolumeSettings,
        images: VolumeImages,
        *,
        bus: Bus | None = None,
    ) -> None:
        self._store = store
        self._bus = bus
        self._directory = state_dir / "volumes"
        self.files = VolumeFiles(self._directory)
        runtime = volumes_runtime(state_dir)
        self.gateways = Gateways(
            runtime / GATEWAYS, self._directory / GATEWAYS, self._directory.with_suffix(".key"), settings
        )
        self.exports = Exports(runtime, self.files, self.gateways)
        self.jobs = Jobs(store, self.files, self.exports, images, settings)
        self._stack = contextlib.AsyncExitStack()

    async def open(self) -> None:
        """Take the directory over: what a killed owner left is removed, done again, or served on. Raises StartupError where
        another process has it."""
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise

    async def close(self) -> None:
        """The exports go on."""
        await self._stack.aclose()

    async def _open(self) -> None:
        lock = await asyncio.to_thread(_take, self._directory)
        self._stack.callback(lock.close)
        self._stack.push_async_callback(self.files.close)
        await types_bootstrap(self._store)
        await self.files.prepare()
        await self._compare_files()
        self._stack.push_async_callback(self.exports.close)
        await self.exports.open(await self._wanted())
        self._stack.push_async_callback(self.jobs.close)
        for volume_id in self.gateways.volumes():
            await self.release(volume_id)  # detached while nobody was here
        await self.jobs.look()
        if self._bus is not None:
            served = await self._bus.serve(STORAGE_QUEUE, self._handle, concurrency_max=WISHES_MAX)
            self._stack.push_async_callback(_cancel, served)
        looking = asyncio.create_task(self._look_for_ever(), name="volumes look")
        self._stack.push_async_callback(_end, looking)

    async def _wanted(self) -> dict[str, dict[str, bool]]:
        """What must be served: volume id → export's name → writable."""
        wanted: dict[str, dict[str, bool]] = {}
        for attachment in await attachment_sql.attachments_connected(self._store):
            volume = await sql.volume_fetch(self._store, attachment.volume_id)
            if volume is not None and await self.files.exists(self.files.volume(volume.id)):
                name, writable = export_name(volume, attachment)
                wanted.setdefault(volume.id, {})[name] = writable
                if await asyncio.to_thread(self.gateways.is_planned, volume.id):
                    wanted[volume.id][volume.export] = True
        return wanted

    async def _compare_files(self) -> None:
        """No file without a record, no record without a file."""
        volumes, snapshots = await sql.volume_statuses(self._store), await snapshot_sql.snapshot_statuses(self._store)
        for path in await self.files.stray(set(volumes), set(snapshots)):
            log.warning("volumes.stray_file", file=path.name)
            await self.files.remove(path)
        for volume_id, status in volumes.items():
            made = status not in ("creating", "deleting", "error")
            if made and not await self.files.exists(self.files.volume(volume_id)):
                log.error("volume.data_lost", volume=volume_id)
                await self._store.write(sql.volume_columns(volume_id, status="error", work=None))
        for snapshot_id, status in snapshots.items():
            if status == "available" and not await self.files.exists(self.files.snapshot(snapshot_id)):
                log.error("snapshot.data_lost", snapshot=snapshot_id)
                await self._store.write(snapshot_sql.snapshot_columns(snapshot_id, status="error"))

    # --- Storage ------------------------------------------------------------------------------------------------------

    async def wake(self, subject: StorageSubject) -> None:
        self.jobs.wake(subject)

    async def ended(self, subject: StorageSubject) -> None:
        await self.jobs.ended(subject)

    async def serve(self, attachment_id: str, *, host_ip: str) -> VolumeConnection:
        attachment = await self._connected(attachment_id)
        volume = await sql.volume_fetch(self._store, attachment.volume_id)
        if volume is None:
            raise NotFound(kind="Volume", id=attachment.volume_id)
        connection = await self.exports.serve(volume, attachment, host_ip=host_ip)
        # Asked again now that it is served: a detach that came meanwhile has found nothing to end.
        try:
            await self._connected(attachment_id)
        except NotFound:
            await self.release(volume.id)
            raise
        return connection

    async def release(self, volume_id: str) -> None:
        async def connected() -> set[str]:
            return {one.id for one in await attachment_sql.attachments_of_volume(self._store, volume_id) if one.host}

        await self.exports.stop(volume_id, connected)

    async def served(self) -> tuple[str, ...]:
        return tuple(await self.exports.served())

    async def _connected(self, attachment_id: str) -> AttachmentRecord:
        record = await attachment_sql.attachment_fetch(self._store, attachment_id)
        if record is None or not record.host:
            raise NotFound(kind="Volume attachment", id=attachment_id)
        return record

    # --- wishes from the bus, and what was missed ------------------------------------------------------------------------

    async def _handle(self, message: Message) -> Reply:
        started = time.perf_counter_ns()

        def reply(body: bytes = b"", error: InstarError | None = None) -> Reply:
            told = None if error is None else (type(error).__name__, error.message, error.facts)
            return Reply(body, (time.perf_counter_ns() - started) // 1000, told)

        try:
            return reply(await self._do(_decoder.decode(message.body)))
        except InstarError as error:
            return reply(error=error)
        except Exception:
            log.exception("storage.wish_crashed", wish=message.kind)
            return reply(error=StepFailed(step=f"{message.kind} of the volumes"))

    async def _do(self, wish: StorageWish) -> bytes:
        match wish:
            case LookAt(subject=subject):
                await self.wake(subject)
                return b""
            case ServeVolume(attachment_id=attachment_id, host_ip=host_ip):
                return _encode(await self.serve(attachment_id, host_ip=host_ip))
            case ReleaseVolume(volume_id=volume_id):
                await self.release(volume_id)
                return b""
            case TellServed():
                return _encode(await self.served())

    async def _look_for_ever(self) -> None:
        """What was asked for while this process did not listen, or did not hear."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.jobs.look()
                for volume_id in await self.exports.served():
                    await self.release(volume_id)
            except Exception as error:  # the database is away, for example: next time
                log.warning("volumes.not_looked", reason=repr(error))




def _take(directory: Path) -> IO[bytes]:
    """The lock on the directory, a file beside it; blocking. Raises StartupError."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = directory.with_suffix(".lock").open("wb")
    try:
        lock_within(lock, LOCK_MAX_S, f"Another process has the volumes in {directory}.")
    except BaseException:
        lock.close()
        raise
    return lock


async def _cancel(subscription: Subscription) -> None:
    await subscription.cancel()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
