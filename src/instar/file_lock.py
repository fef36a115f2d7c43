"""Waiting for a file's lock, which tells a process that it has something for itself. It goes with the process that has it,
however that ends. Used by who serves a host, keeps volumes, or starts a private libvirtd."""

from __future__ import annotations

import fcntl
import time
from typing import IO, Any

from instar.errors import StartupError

POLL_S = 0.05  # no event tells that a lock is free, and a wait for it could not be given up


def lock_within(file: IO[Any], wait_max_s: float, busy: str) -> None:
    """The lock on an open file is ours until it is closed. Blocking. Raises StartupError, with the words `busy`, where
    somebody has it for longer than that."""
    deadline = time.monotonic() + wait_max_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StartupError(busy) from None
            time.sleep(POLL_S)
