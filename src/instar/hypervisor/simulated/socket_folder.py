"""Folders of the sockets of simulated hosts, in the directory of temporary files: a socket's path must be short, that of a
state directory may be long. Used by `serial_console.py` and `neighbours.py`.

A folder is locked by the process that made it as long as that lives, so those of processes that were killed are known, and
go when the next one is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "instar-sim-sockets-"


class SocketFolder:
    """A new, empty folder that only its owner may enter. Blocking."""

    def __init__(self) -> None:
        _remove_left_behind()
        made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}"))
        self._descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(made.name.removeprefix("new-")))  # locked before anybody looks for it

    def remove(self) -> None:
        """With all that is in it. Once. Blocking."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def _remove_left_behind() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody has it, or it went this moment
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
