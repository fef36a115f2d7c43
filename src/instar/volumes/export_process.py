"""The process that serves one volume's data: a qemu-storage-daemon of its own, found by its pid file. Blocking.

Called by `exports.py` in threads, by `instar down`, and by nobody else. The process is nobody's child: it serves guests
while the cloud is stopped, is restarted, or dies. What is secret (the export's name) goes through its monitor: the command
line, which every user of the machine can read, has the path of the monitor alone. Every method may be called again.

    RUNTIME/<volume id>.pid .mon .sock      RUNTIME is on a file system that a restart of the machine empties
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instar.nbd.daemon import StorageDaemon, daemons
from instar.nbd.monitor import Monitor, MonitorError

END_MAX_S = 10.0
POLL_S = 0.01
_DISK = "disk"
_COPY = "copy-"


class CopyState(NamedTuple):
    """How far a copy is. `error` is the process's own text; None: it went well, or goes on."""

    ended: bool
    error: str | None


class Running(NamedTuple):
    """The process, and the size of the volume that it has open."""

    pid: int
    size_bytes: int


class ExportProcess:
    def __init__(self, runtime: Path, volume_id: str) -> None:
        self._daemon = StorageDaemon(runtime, volume_id)
        self.socket = self._daemon.socket

    def pid(self) -> int | None:
        """The process, when it lives."""
        return self._daemon.pid()

    def ensure_running(self, file: Path, names: Mapping[str, bool] | None = None) -> Running:
        """The process runs, has the volume's file open, and clients of its socket find the volume under these names: name →
        whether it may be written. Raises MonitorError."""
        pid = self._daemon.ensure_running()
        opened = False
        try:
            with self._daemon.monitor() as monitor:
                size_bytes = _size_of_disk(monitor)
                if size_bytes is None:
                    below = {"driver": "file", "filename": str(file), "discard": "unmap"}
                    monitor.call("blockdev-add", driver="qcow2", node_name=_DISK, discard="unmap", file=below)
                    size_bytes = _size_of_disk(monitor) or 0
                opened = True
                if names:
                    self._serve(monitor, names)
        except MonitorError:
            if not opened:
                self.end()
            raise
        return Running(pid, size_bytes)

    def _serve(self, monitor: Monitor, names: Mapping[str, bool]) -> None:
        exports = {one["id"] for one in monitor.call("query-block-exports")}
        for name, writable in names.items():
            export_id = "rw" if writable else "ro"
            if export_id in exports:
                continue
            exports.add(export_id)
            if not self.socket.exists():
                address = {"type": "unix", "data": {"path": str(self.socket)}}
                monitor.call("nbd-server-start", addr=address, max_connections=0)
                self._daemon.let_qemu_in()
            monitor.call("block-export-add", type="nbd", id=export_id, node_name=_DISK, name=name, writable=writable)

    def stop_serving(self) -> None:
        """Clients are cut off, the process stays. Raises MonitorError."""
        with self._daemon.monitor() as monitor:
            for one in monitor.call("query-block-exports"):
                monitor.call("block-export-del", id=one["id"], mode="hard")
            deadline = time.monotonic() + END_MAX_S
            while monitor.call("query-block-exports"):
                if time.monotonic() > deadline:
                    raise MonitorError(description="a client is still being served")
                time.sleep(POLL_S)

    def size_bytes(self) -> int:
        """Raises MonitorError."""
        with self._daemon.monitor() as monitor:
            size_bytes = _size_of_disk(monitor)
        if size_bytes is None:
            raise MonitorError(description="the volume is not open")
        return size_bytes

    def resize(self, size_bytes: int) -> None:
        """Raises MonitorError, also while the volume is served."""
        with self._daemon.monitor() as monitor:
            monitor.call("block_resize", **{"node-name": _DISK, "size": size_bytes})

    # --- copies -------------------------------------------------------------------------------------------------------

    def copy_start(self, copy_id: str, target: Path) -> None:
        """The volume as it is at this moment goes to an empty qcow2 file of its size; guests may go on writing."""
        name = _COPY + copy_id
        with self._daemon.monitor() as monitor:
            below = {"driver": "file", "filename": str(target)}
            monitor.call("blockdev-add", driver="qcow2", node_name=name, file=below)
            monitor.call("blockdev-backup", job_id=name, device=_DISK, target=name, sync="full", auto_dismiss=False)

    def copy_state(self, copy_id: str) -> CopyState:
        """Raises MonitorError: there is no such copy, or no process."""
        with self._daemon.monitor() as monitor:
            for job in monitor.call("query-jobs"):
                if job["id"] == _COPY + copy_id:
                    return CopyState(job["status"] == "concluded", job.get("error"))
        raise MonitorError(description="the copy is gone")

    def copies_end(self, copy_id: str | None = None) -> None:
        """This copy (None: every copy) has ended, be it cancelled, and its file is closed. Raises MonitorError."""
        wanted = None if copy_id is None else _COPY + copy_id
        with self._daemon.monitor() as monitor:
            deadline = time.monotonic() + END_MAX_S
            while jobs := _jobs(monitor, wanted):
                for job in jobs:
                    with contextlib.suppress(MonitorError):  # it ends at this very moment
                        if job["status"] == "concluded":
                            monitor.call("job-dismiss", id=job["id"])
                        else:
                            monitor.call("block-job-cancel", device=job["id"], force=True)
                if time.monotonic() > deadline:
                    raise MonitorError(description="a copy does not end")
                time.sleep(POLL_S)
            for node in monitor.call("query-named-block-nodes", flat=True):
                if node["node-name"] == wanted or (wanted is None and node["node-name"].startswith(_COPY)):
                    monitor.call("blockdev-del", node_name=node["node-name"])

    def end(self) -> None:
        """The process is gone; what guests had flushed is in the file."""
        self._daemon.end()


def export_volumes(runtime: Path) -> list[str]:
    """Ids of the volumes that have, or had, a process."""
    return daemons(runtime)


def end_everything(runtime: Path) -> None:
    """No process serves any volume, and nothing is left of them. For a cloud that does not run."""
    for volume_id in export_volumes(runtime):
        ExportProcess(runtime, volume_id).end()
    shutil.rmtree(runtime, ignore_errors=True)


def _size_of_disk(monitor: Monitor) -> int | None:
    """None: it is not open."""
    for node in monitor.call("query-named-block-nodes", flat=True):
        if node["node-name"] == _DISK:
            return int(node["image"]["virtual-size"])
    return None


def _jobs(monitor: Monitor, wanted: str | None) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = monitor.call("query-jobs")
    return [job for job in jobs if job["id"] == wanted or (wanted is None and job["id"].startswith(_COPY))]
