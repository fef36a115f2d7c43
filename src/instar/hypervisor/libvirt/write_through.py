"""A file goes to the disk while a program is still writing it, so that the last fsync has little left to do.

Used for copies of disks, which must be on stable storage before anybody hears of them: half of the time of a copy would
otherwise be spent on the fsync at its end, in which nothing else is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

PAUSE_S = 0.02  # between two rounds, at least; else as long as the last one took: the writer is to get its turn


@contextlib.asynccontextmanager
async def written_through(path: Path) -> AsyncIterator[None]:
    """What stands in the file goes to the disk again and again within the block, and all of it at its end. The file may
    appear late. Leaving the block takes as long as the disk has still to write.

    Raises OSError where the disk could not take it: also what went wrong on the way, of which the kernel tells only once.
    FileNotFoundError where there is no file at the end."""
    rounds = _Rounds(path)
    thread = threading.Thread(target=rounds.run, name="write-through", daemon=True)
    thread.start()
    try:
        yield
    finally:
        rounds.ended.set()  # of a block that failed nobody wants the file: the thread ends by itself
    await asyncio.to_thread(thread.join)
    if rounds.failure is not None:
        raise rounds.failure


class _Rounds:
    def __init__(self, path: Path) -> None:
        self.ended = threading.Event()
        self.failure: OSError | None = None
        self._path = path

    def run(self) -> None:
        """Blocking, until `ended`. One descriptor from the first round to the last: each tells of all errors since it was
        opened, so that none is told to nobody."""
        descriptor = -1
        try:
            pause_s = PAUSE_S
            while not self.ended.wait(pause_s):
                descriptor = self._opened() if descriptor < 0 else descriptor
                began = time.monotonic()
                if descriptor >= 0:
                    os.fdatasync(descriptor)
                pause_s = max(PAUSE_S, time.monotonic() - began)
            if descriptor < 0:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(descriptor)
        except OSError as error:
            self.failure = error
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _opened(self) -> int:
        """-1 while there is no file."""
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1
