"""The fence: which epoch a host has seen for each instance, so that a slow conductor's command does no harm.

An append-only file, so that it survives the process; compacted when it is opened, and before it grows long. Used by
the agent alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from instar.errors import StaleEpoch

REMEMBERED_MAX = 100_000  # instances; the ones that were longest without a command are forgotten first


class Fence:
    """`path` None keeps it in memory (simulated hosts that live no longer than their process)."""

    def __init__(self, path: Path | None) -> None:
        self.path = self._path = path
        self._epochs: dict[str, int] = {}
        self._file: int | None = None
        self._lines = 0

    def open(self) -> None:
        if self._path is None:
            return
        if self._path.exists():
            for line in self._path.read_text(encoding="ascii", errors="ignore").splitlines():
                key, _, epoch = line.rpartition(" ")
                if key and epoch.isdigit():  # a last line torn by a crash is no line
                    self._epochs[key] = max(int(epoch), self._epochs.pop(key, 0))
            for key in list(self._epochs)[:-REMEMBERED_MAX]:
                del self._epochs[key]
        self._compact()

    def _compact(self) -> None:
        assert self._path is not None
        self.close()
        compacted = self._path.with_suffix(".new")
        compacted.write_text("".join(f"{key} {epoch}\n" for key, epoch in self._epochs.items()), encoding="ascii")
        compacted.replace(self._path)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._lines = len(self._epochs)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def check(self, host: str, instance_id: str, epoch: int) -> None:
        """Raises StaleEpoch for an epoch below the highest that was seen; a higher one is remembered first."""
        key = f"{host} {instance_id}"
        seen = self._epochs.get(key, 0)
        if epoch < seen:
            raise StaleEpoch(id=instance_id)
        if epoch > seen:
            self._epochs.pop(key, None)
            self._epochs[key] = epoch
            if len(self._epochs) > REMEMBERED_MAX:
                del self._epochs[next(iter(self._epochs))]
            if self._file is not None:
                os.write(self._file, f"{key} {epoch}\n".encode("ascii"))
                self._lines += 1
                if self._lines > 2 * REMEMBERED_MAX:
                    self._compact()
