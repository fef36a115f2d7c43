"""The data of volumes and snapshots as qcow2 files, and the qemu-img runs that make them. Called by `jobs.py`, `owner.py`.

    STATE_DIR/volumes/<id>.qcow2             a volume
    STATE_DIR/volumes/snapshots/<id>.qcow2   a snapshot: a whole copy, of nothing else
    STATE_DIR/volumes/incoming/<random>      what is being made; gets its name when it is whole and synced

So a file with a name is whole, and whatever is in incoming at a start is garbage. One process owns the directory.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from instar.errors import HypervisorError, NotFound, StepTimeout
from instar.file_sync import sync_path

log = structlog.get_logger()

_T = TypeVar("_T")
GIB = 1 << 30
THREADS = 8
MEMORY_MAX_BYTES = 2 << 30
QUICK_S = 60.0  # what touches no data
_DIRECTORY_MODE = 0o700  # guests reach volumes through exports alone
_FILE_MODE = 0o600


class VolumeFiles:
    """`directory` is made by `prepare`. Files are touched in threads of our own, never on the event loop."""

    def __init__(self, directory: Path) -> None:
        self._volumes = directory.absolute()
        self._snapshots = self._volumes / "snapshots"
        self._incoming = self._volumes / "incoming"
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="volume-file")

    def volume(self, volume_id: str) -> Path:
        return self._volumes / f"{checked_id(volume_id, 'Volume')}.qcow2"

    def snapshot(self, snapshot_id: str) -> Path:
        return self._snapshots / f"{checked_id(snapshot_id, 'Snapshot')}.qcow2"

    def new(self) -> Path:
        """Where something can be made."""
        return self._incoming / uuid.uuid4().hex

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    async def prepare(self) -> None:
        """At start, when no program of an earlier process writes any more: directories are there, incoming is empty."""
        await self._run(self._prepare)

    async def stray(self, volumes: set[str], snapshots: set[str]) -> list[Path]:
        """Files that none of these records has."""
        return await self._run(self._stray, volumes, snapshots)

    def kept(self, volume_id: str, turn: str) -> Path:
        """What a volume had before its data was replaced."""
        return self._volumes / f"{checked_id(volume_id, 'Volume')}.{checked_id(turn, 'Operation')}.kept"

    async def keep(self, volume: Path, kept: Path) -> None:
        """The volume's data has a name besides, and stays when the volume gets other data. Again: the first counts."""
        await self._run(_keep, volume, kept)

    async def forget_kept(self, volume_id: str) -> None:
        """Nothing of the volume is kept any more."""
        await self._run(self._forget_kept, checked_id(volume_id, "Volume"))

    async def exists(self, path: Path) -> bool:
        return await self._run(path.exists)

    async def place(self, made: Path, final: Path) -> None:
        """What was made is whole: it is synced and gets its name."""
        await self._run(_place, made, final)

    async def remove(self, path: Path) -> None:
        """The file is gone, also over a power cut; also when it never was."""
        await self._run(_remove, path)

    async def size_bytes(self, path: Path) -> int:
        """Of the disk in a qcow2 file, not of the file."""
        said = await self._program(["qemu-img", "info", "-U", "--output=json", "-f", "qcow2", str(path)], QUICK_S)
        return msgspec.json.decode(said, type=_Info).virtual_size

    async def create(self, path: Path, size_bytes: int) -> None:
        await self._program(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size_bytes)], QUICK_S)
        await self._run(path.chmod, _FILE_MODE)

    async def resize(self, path: Path, size_bytes: int) -> None:
        """Grow the disk in a file that nothing serves. The same size again: nothing."""
        if await self.size_bytes(path) < size_bytes:
            await self._program(["qemu-img", "resize", "-q", "-f", "qcow2", str(path), str(size_bytes)], QUICK_S)

    async def convert(self, source: Path, source_format: str, target: Path, target_format: str, deadline_s: float) -> None:
        """A copy of a disk that nobody writes to. Formats are given, never guessed from what the disk holds."""
        await self._program(
            ["qemu-img", "convert", "-q", "-f", source_format, "-O", target_format, str(source), str(target)], deadline_s
        )
        await self._run(target.chmod, _FILE_MODE)

    async def _program(self, argv: list[str], deadline_s: float) -> bytes:
        """A program that ends with us, whatever happens to us: its file must not be written to by two."""
        program = _Program(argv)
        ended = asyncio.get_running_loop().run_in_executor(self._threads, program.run)
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.shield(ended)
        except TimeoutError as error:
            await program.end(ended)
            raise StepTimeout(what=argv[0], waited_s=deadline_s) from error
        except asyncio.CancelledError:
            await program.end(ended)
            raise

    async def _run(self, call: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    # --- in the threads -----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for directory in (self._volumes, self._snapshots, self._incoming):
            directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink(missing_ok=True)

    def _stray(self, volumes: set[str], snapshots: set[str]) -> list[Path]:
        found = [path for path in self._volumes.glob("*.qcow2") if path.stem not in volumes]
        found += [path for path in self._volumes.glob("*.kept") if path.name.partition(".")[0] not in volumes]
        return found + [path for path in self._snapshots.glob("*.qcow2") if path.stem not in snapshots]


    def _forget_kept(self, volume_id: str) -> None:
        for path in self._volumes.glob(f"{volume_id}.*.kept"):
            _remove(path)


class _Info(msgspec.Struct, rename="kebab"):
    virtual_size: int


class _Program:
    """One run of a program of the host, under limits; it can be ended from the event loop."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = ["setpriv", "--pdeathsig", "KILL", "prlimit", f"--as={MEMORY_MAX_BYTES}", "--core=0", "--", *argv]
        self._name = argv[0]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def run(self) -> bytes:
        with self._lock:
            if self._ended:
                return b""
            try:
                self._process = subprocess.Popen(
                    self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env={**os.environ, "LC_ALL": "C"},
                )  # fmt: skip
            except FileNotFoundError as error:
                raise HypervisorError(reason=f"the program {error.filename} is not installed") from error
        said, complained = self._process.communicate()
        if self._process.returncode != 0 and not self._ended:
            text = complained[-2000:].decode(errors="replace")
            log.warning("volume.program_failed", program=self._name, status=self._process.returncode, complaint=text)
            full = "No space left on device" in text
            raise HypervisorError(reason="no space is left for volumes" if full else f"{self._name} failed")
        return said

    async def end(self, ended: asyncio.Future[bytes]) -> None:
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()
        await asyncio.wait([ended])
        ended.exception()  # told nobody: whoever waited has given up


def checked_id(record_id: str, kind: str) -> str:
    """Only a UUID, as we write them, may name a file. Raises NotFound."""
    try:
        if str(uuid.UUID(record_id)) == record_id:
            return record_id
    except ValueError:
        pass
    raise NotFound(kind=kind, id=record_id)


def _place(made: Path, final: Path) -> None:
    sync_path(made)
    made.replace(final)
    sync_path(final.parent)


def _keep(volume: Path, kept: Path) -> None:
    try:
        kept.hardlink_to(volume)
    except FileExistsError:
        return
    sync_path(kept.parent)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_path(path.parent)
