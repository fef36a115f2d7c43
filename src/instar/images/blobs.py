"""The data of images as files: `<sha256>` for what is stored, `incoming/<uuid>` for what is on its way or not hashed yet.

Called by this room alone. A file gets its final name only when it is whole, synced, hashed and inspected; it is read-only
from then on. Which files are in use is the database's matter. Many processes may share the directory, also over NFSv4: who
writes to `incoming/` holds a lock on the file, which ends with the process, and names are given and taken under the locks
of `file_locks.py`. Hosts write into `incoming/` what they were given a name for; those files belong to an operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from instar.errors import HypervisorError, TooLarge
from instar.file_sync import sync_path
from instar.images.file_locks import FileLocks, is_held
from instar.model.hash_note import note_hash, was_hashed_lately

_T = TypeVar("_T")

BUFFER_BYTES = 1 << 20
FILE_THREADS = 4
_FILE_MODE = 0o444
_DIRECTORY_MODE = 0o711
_HASH_PIECE_BYTES = 1 << 18
_HASH_PIECES = 32  # read and hashed in one go in a thread; a caller that is cancelled waits for no more than that
_WRITER_ENDS_S = 1.0  # a program that has just done its work may still be closing the file
_LOOK_S = 0.002
_ZEROS = bytes(BUFFER_BYTES)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Received(NamedTuple):
    """Data that arrived whole: a synced file under incoming/, and its hashes in hexadecimal; None: not computed yet."""

    path: Path
    size_bytes: int
    md5: str | None
    sha256: str | None
    sha512: str | None


class Blobs:
    """`directory` is made by `prepare`. Files are touched in threads of our own, never on the event loop."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._incoming = self._directory / "incoming"
        self._threads = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="image-file")
        self._patient = ThreadPoolExecutor(1, thread_name_prefix="image-checksum", initializer=_give_way)
        self.locks = FileLocks(self._directory / "locks")

    def path(self, sha256: str) -> Path:
        return self._directory / sha256

    def incoming(self, name: str) -> Path:
        return self._incoming / name

    async def prepare(self) -> None:
        """At start: make the directory."""
        await self._run(self._prepare)

    async def listing(self) -> tuple[set[str], set[str]]:
        """Names of what is stored, and of what is incoming."""
        return await self._run(self._listing)

    async def is_written(self, name: str) -> bool:
        """Whether a process that lives is writing incoming/<name>."""
        return await self._run(is_held, self._incoming / name)

    async def remove_unwritten(self, names: set[str]) -> int:
        """Remove those of these incoming files that no living process writes. Returns how many."""
        return await self._run(self._remove_unwritten, names)

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._patient.shutdown)

    @contextlib.asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator[Incoming]:
        """A new file incoming/<name>, which is this process's as long as the block, or the process, lasts; gone after it.

        Raises TooLarge: the disk is full."""
        try:
            file = await self._run(_Incoming, self._incoming / name)
        except OSError as error:
            _refuse_when_full(error)
            raise
        try:
            yield Incoming(file, self._threads)
        finally:
            await asyncio.shield(self._run(file.discard))

    async def rename_incoming(self, name: str, new: str) -> None:
        """What was written whole gets the name under which it is waited for."""
        await self._run(os.replace, self._incoming / name, self._incoming / new)

    async def adopt(self, name: str, *, size_max_bytes: int) -> Received:
        """incoming/<name>, which somebody else has written: read-only from then on, and neither synced nor hashed yet.

        Raises FileNotFoundError, TooLarge, HypervisorError where somebody still writes to it."""
        path = self._incoming / name
        size_bytes = await self._run(_take_over, path)
        if size_bytes > size_max_bytes:
            raise TooLarge(f"The image is larger than the {size_max_bytes} bytes allowed.")
        return Received(path, size_bytes, None, None, None)

    async def synced(self, name: str) -> None:
        """incoming/<name> is on the disk, as is its name. Raises FileNotFoundError."""
        await self._run(_sync, self._incoming / name)

    async def is_hashed(self, name: str, sha256: str) -> bool:
        """incoming/<name> is the very file that had this SHA-256 a moment ago."""
        return await self._run(was_hashed_lately, self._incoming / name, sha256)

    async def hashed(self, name: str) -> tuple[Received, str]:
        """incoming/<name> and its SHA-256, which is all that anybody waits for: of the other hashes see `checksums`.

        Raises FileNotFoundError, also when it is removed meanwhile; HypervisorError where somebody wrote to it."""
        path = self._incoming / name
        file = await self._run(_open_binary, path)
        try:
            before, running = os.fstat(file.fileno()), hashlib.sha256()
            while await self._hash(self._threads, file, running):
                _must_exist(file)
            after = os.fstat(file.fileno())
        finally:
            file.close()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise HypervisorError(reason="the data of the image changed while it was read")
        sha256 = running.hexdigest()
        await self._run(note_hash, path, sha256, after)
        return Received(path, after.st_size, None, sha256, None), sha256

    async def checksums(self, sha256: str) -> tuple[str, str]:
        """MD5 and SHA-512 of stored data, in hexadecimal, in a thread that gives way to all others.

        Raises FileNotFoundError: no image uses it any more."""
        path = self.path(sha256)
        file = await self._run(_open_binary, path)
        try:
            md5, sha512 = hashlib.md5(usedforsecurity=False), hashlib.sha512()
            while await self._hash(self._patient, file, md5, sha512):
                _must_be_stored(path)
        finally:
            file.close()
        return md5.hexdigest(), sha512.hexdigest()

    async def discard_incoming(self, name: str) -> None:
        """Remove incoming/<name> and what a host keeps beside it while it writes, incoming/<name>.<anything>."""
        await self._run(self._discard_incoming, name)

    async def discard_beside(self, name: str) -> None:
        """Remove what a host kept beside incoming/<name> while it wrote it."""
        await self._run(self._discard_incoming, name, True)

    async def place(self, received: Received, sha256: str) -> Path:
        """Give the file its final name. Call with its content's lock held. The same again: the one that is there stays.

        The incoming name stays: what is killed before the row is written can begin anew from there."""
        return await self._run(self._place, received, sha256)

    async def remove(self, sha256: str) -> None:
        """Remove stored data that no image uses. Call with its lock held."""
        await self._run(_unlink, self.path(sha256))

    async def open_data(self, sha256: str) -> BinaryIO:
        """An open file: it can be read to its end even when the image is deleted meanwhile. Raises FileNotFoundError."""
        return await self._run(_open_binary, self.path(sha256))

    async def open_incoming(self, name: str) -> BinaryIO:
        """The same for data that is not hashed yet."""
        return await self._run(_open_binary, self.incoming(name))

    def stream(self, file: BinaryIO, offset: int, length: int) -> FileStream:
        """`length` bytes from `offset`, in pieces; the file is closed at the end, or by `aclose`."""
        return FileStream(file, self._threads, offset, length)

    async def read_file(self, path: Path) -> AsyncIterator[bytes]:
        """The whole of a file of this machine, in pieces."""
        file = await self._run(_open_binary, path)
        try:
            while data := await self._run(file.read, BUFFER_BYTES):
                yield data
        finally:
            file.close()

    # --- in the threads -----------------------------------------------------------------------------------------------

    async def _run(self, call: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    async def _hash(self, threads: ThreadPoolExecutor, file: BinaryIO, *hashes: Any) -> bool:
        """See _hash_some. A caller that is cancelled waits for the thread: the file must not be closed under its hands."""
        work = asyncio.get_running_loop().run_in_executor(threads, _hash_some, file, *hashes)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    def _prepare(self) -> None:
        # Other users of this machine may open a file whose hash they know, as QEMU does, and not look around.
        self._directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        self._directory.chmod(_DIRECTORY_MODE)
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        (self._directory / "locks").mkdir(mode=0o700, exist_ok=True)

    def _listing(self) -> tuple[set[str], set[str]]:
        stored = {path.name for path in self._directory.iterdir() if path.is_file()}
        return stored, {path.name for path in self._incoming.iterdir()}

    def _remove_unwritten(self, names: set[str]) -> int:
        removed = 0
        for path in (self._incoming / name for name in names):
            if not is_held(path):
                _unlink(path)
                removed += 1
        return removed

    def _place(self, received: Received, sha256: str) -> Path:
        path = self.path(sha256)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == received.size_bytes:
                return path
            _unlink(path)
        os.link(received.path, path)
        sync_path(self._directory)
        return path

    def _discard_incoming(self, name: str, only_beside: bool = False) -> None:
        for path in self._incoming.iterdir():
            if (path.name == name and not only_beside) or path.name.startswith(f"{name}."):
                _unlink(path)


class FileStream:
    """Part of a file, read in a thread piece by piece. No generator: one that never started would leave its file open."""

    def __init__(self, file: BinaryIO, threads: ThreadPoolExecutor, offset: int, length: int) -> None:
        self._file = file
        self._threads = threads
        self._offset = offset
        self._end = offset + length

    def __aiter__(self) -> FileStream:
        return self

    async def __anext__(self) -> bytes:
        if self._offset >= self._end:
            await self.aclose()
            raise StopAsyncIteration
        data = await asyncio.get_running_loop().run_in_executor(
            self._threads, os.pread, self._file.fileno(), min(BUFFER_BYTES, self._end - self._offset), self._offset
        )
        if not data:
            raise OSError(errno.EIO, "The image's data is shorter than its record says")
        self._offset += len(data)
        return data

    async def aclose(self) -> None:
        self._file.close()


class Incoming:
    """A file that arrives: `receive` it, once."""

    def __init__(self, file: _Incoming, threads: ThreadPoolExecutor) -> None:
        self._file, self._threads = file, threads

    async def receive(self, chunks: AsyncIterator[bytes], *, size_max_bytes: int) -> Received:
        """Write what arrives, hashing on the way; whole, synced and read-only when this returns.

        `chunks` sees to it that a silent sender is given up. Raises TooLarge: more than `size_max_bytes`, or disk full."""
        loop, file = asyncio.get_running_loop(), self._file
        try:
            async for buffer in _buffered(chunks):
                if file.size_bytes + len(buffer) > size_max_bytes:
                    raise TooLarge(f"The image is larger than the {size_max_bytes} bytes allowed.")
                await loop.run_in_executor(self._threads, file.write, buffer)
            return await loop.run_in_executor(self._threads, file.finish)
        except OSError as error:
            _refuse_when_full(error)
            raise


class _Incoming:
    """One file being written, and the lock on it. Blocks of zeros become holes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _create_locked(path)
        self._hashes = (hashlib.md5(usedforsecurity=False), hashlib.sha256(), hashlib.sha512())
        self.size_bytes = 0

    def write(self, buffer: bytes) -> None:
        for running in self._hashes:
            running.update(buffer)
        if buffer == _ZEROS[: len(buffer)]:
            self._file.seek(len(buffer), os.SEEK_CUR)
        else:
            rest = memoryview(buffer)
            while rest:
                rest = rest[self._file.write(rest) :]
        self.size_bytes += len(buffer)

    def finish(self) -> Received:
        """It stays open, and locked: until the row that uses the data is written, it is not for others to remove."""
        self._file.truncate(self.size_bytes)
        os.fchmod(self._file.fileno(), _FILE_MODE)
        os.fsync(self._file.fileno())
        md5, sha256, sha512 = (running.hexdigest() for running in self._hashes)
        return Received(self._path, self.size_bytes, md5, sha256, sha512)

    def discard(self) -> None:
        _unlink(self._path)
        self._file.close()


def _create_locked(path: Path) -> FileIO:
    """A new file with a lock of ours. Whoever sweeps may have found it before it was locked: then once more."""
    while True:
        file = FileIO(path, "xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _refuse_when_full(error: OSError) -> None:
    if error.errno in _NO_SPACE:
        raise TooLarge("There is not enough space left to store the image.") from error


async def _buffered(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in blocks of BUFFER_BYTES (the last may be shorter): few trips to a thread, and holes that align."""
    waiting = bytearray()
    async for chunk in chunks:
        waiting += chunk
        while len(waiting) >= BUFFER_BYTES:
            yield bytes(waiting[:BUFFER_BYTES])
            del waiting[:BUFFER_BYTES]
    if waiting:
        yield bytes(waiting)


def _open_binary(path: Path) -> BinaryIO:
    return path.open("rb")


def _take_over(path: Path) -> int:
    """Blocking: what another process has written stays as it is; its size. Raises FileNotFoundError, HypervisorError where
    somebody still writes to it."""
    if path.is_symlink() or not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "No file of this name")
    path.chmod(_FILE_MODE)
    with path.open("rb", buffering=0) as file:
        deadline = time.monotonic() + _WRITER_ENDS_S
        while _is_written_to(file):
            if time.monotonic() > deadline:
                raise HypervisorError(reason="the data of the image is still written to")
            time.sleep(_LOOK_S)
        return os.fstat(file.fileno()).st_size


def _sync(path: Path) -> None:
    sync_path(path)
    sync_path(path.parent)


def _is_written_to(file: FileIO) -> bool:
    """Some process has the file open for writing: nobody gets a lease to read then. Where there are no leases: no."""
    try:
        fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _must_exist(file: BinaryIO) -> None:
    """Raises FileNotFoundError where no name leads to the file any more."""
    if os.fstat(file.fileno()).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, "The image was deleted meanwhile")


def _must_be_stored(path: Path) -> None:
    """Raises FileNotFoundError. A host's cache on this machine may have another name of a file that is deleted here."""
    path.stat()


def _give_way() -> None:
    """The thread that calls it runs when no other wants to: on Linux each has a priority of its own."""
    with contextlib.suppress(OSError):  # then it is a thread like others
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _hash_some(file: BinaryIO, *hashes: Any) -> bool:
    """Some more of the file goes into the hashes; False at its end."""
    piece = memoryview(bytearray(_HASH_PIECE_BYTES))  # one that stays in the processor's cache
    for _ in range(_HASH_PIECES):
        length = os.readv(file.fileno(), [piece])
        if not length:
            return False
        for running in hashes:
            running.update(piece[:length])
    return True


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
