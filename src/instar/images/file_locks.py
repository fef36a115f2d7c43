"""Locks on files of the image directory: they hold between processes and machines, and end with whoever holds them.

`flock` on a local file system, and on NFSv4, where the kernel makes it a lock of the server. No lock is ever stale: the
kernel (or the server, after its lease) lets go of what a dead process held. Called by this room alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from instar.errors import Unavailable

WAIT_MAX_S = 30.0
LOOK_MIN_S, LOOK_MAX_S = 0.005, 0.1


class FileLocks:
    """Named locks as files below `directory`, which is there by the time the first is taken."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._here: dict[str, asyncio.Lock] = {}  # in this process nobody has to look again and again

    @contextlib.asynccontextmanager
    async def content(self, sha256: str) -> AsyncIterator[None]:
        """Held while a file gets or loses its final name together with the row that uses it, so that the end of the last
        image with some content does not take the file from an upload of the same content that has just found it.

        One lock for many contents: 256 files in all. Raises Unavailable where another process holds it for too long."""
        async with self.hold(f"content-{sha256[:2]}"):
            yield

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """The lock of that name. Raises Unavailable where it is not free in time."""
        async with self._here.setdefault(name, asyncio.Lock()):
            began, pause = time.monotonic(), LOOK_MIN_S
            while (file := await self._take(name)) is None:
                if time.monotonic() - began > WAIT_MAX_S:
                    raise Unavailable(retry_after_s=5)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LOOK_MAX_S)
            try:
                yield
            finally:
                await asyncio.shield(asyncio.to_thread(os.close, file))

    @contextlib.asynccontextmanager
    async def hold_if_free(self, name: str) -> AsyncIterator[bool]:
        """Yields False, at once, where somebody else has it."""
        file = await self._take(name)
        try:
            yield file is not None
        finally:
            if file is not None:
                await asyncio.shield(asyncio.to_thread(os.close, file))

    async def _take(self, name: str) -> int | None:
        """A cancelled caller must not leave a lock behind that nobody can let go of."""
        taking = asyncio.ensure_future(asyncio.to_thread(_take, self._directory / name))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            await asyncio.wait([taking])
            if taking.exception() is None and (file := taking.result()) is not None:
                os.close(file)
            raise


def _take(path: Path) -> int | None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return file


def is_held(path: Path) -> bool:
    """Blocking: whether a process that lives holds the lock on this file; a file that is not there is not held."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, because a file that is finished can be opened for reading alone, and NFS gives no more for that.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
