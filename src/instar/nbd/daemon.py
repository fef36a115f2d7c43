"""A qemu-storage-daemon of its own, found by its pid file. Blocking: called in threads by whoever says what it serves.

The process is nobody's child: it serves guests while the program that started it is stopped, is restarted, or dies. What is
secret goes through its monitor or a file that only we read: the command line, which every user of the machine can see, has
the path of the monitor alone. Every method may be called again.

    RUNTIME/NAME.pid .mon .sock      RUNTIME is on a file system that a restart of the machine empties
"""

from __future__ import annotations

import contextlib
import grp
import os
import select
import signal
import subprocess
from pathlib import Path

import structlog

from instar.nbd.monitor import Monitor, MonitorError
from instar.nbd.place import leave_place

log = structlog.get_logger()

PROGRAM = "qemu-storage-daemon"
START_MAX_S = 20.0
END_MAX_S = 10.0
# QEMU of a machine's own libvirtd does not run as root; this group lets it in, where there is one.
_QEMU_GROUPS = ("libvirt-qemu",)


class StorageDaemon:
    """`socket` is where it may listen for guests."""

    def __init__(self, runtime: Path, name: str) -> None:
        self._runtime = runtime
        self._pid_file = runtime / f"{name}.pid"
        self._monitor = runtime / f"{name}.mon"
        self.socket = runtime / f"{name}.sock"

    def pid(self) -> int | None:
        """The process, when it lives. Pids are used again: it must have our monitor on its command line."""
        try:
            pid = int(self._pid_file.read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            return None
        ours = Path(words[0]).name == PROGRAM and any(str(self._monitor).replace(",", ",,") in word for word in words)
        return pid if ours else None

    def ensure_running(self) -> int:
        """Its pid. A new one serves nothing yet. Raises MonitorError."""
        return self.pid() or self._start()

    def monitor(self) -> Monitor:
        return Monitor(self._monitor)

    def let_qemu_in(self) -> None:
        """Guests' QEMU may connect to the socket, nobody else."""
        for name in _QEMU_GROUPS:
            with contextlib.suppress(KeyError, PermissionError):
                os.chown(self.socket, -1, grp.getgrnam(name).gr_gid)
                self.socket.chmod(0o660)

    def end(self) -> None:
        """The process is gone, after it has flushed what it holds."""
        pid = self.pid()
        if pid is not None:
            _signal_and_wait(pid)
        for path in (self._pid_file, self._monitor, self.socket):
            path.unlink(missing_ok=True)
        leave_place(self._runtime)

    def _start(self) -> int:
        """The directory is made anew where the last process of another name took it away at this very moment."""
        try:
            return self._started()
        except MonitorError:
            if self._runtime.is_dir():
                raise
            return self._started()

    def _started(self) -> int:
        self._runtime.mkdir(mode=0o711, parents=True, exist_ok=True)
        for path in (self._pid_file, self._monitor, self.socket):
            path.unlink(missing_ok=True)
        monitor = str(self._monitor).replace(",", ",,")
        try:
            ended = subprocess.run(
                [
                    PROGRAM, "--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off",
                    "--monitor", "chardev=monitor", "--pidfile", str(self._pid_file), "--daemonize",
                ],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=START_MAX_S, check=False, umask=0o077, cwd="/",
            )  # fmt: skip
        except FileNotFoundError as error:
            raise MonitorError(description=f"{PROGRAM} is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise MonitorError(description=f"{PROGRAM} did not start within {START_MAX_S:g} seconds") from error
        if ended.returncode != 0:
            raise MonitorError(description=ended.stderr[-1000:].decode(errors="replace"))
        return int(self._pid_file.read_text())


def daemons(runtime: Path) -> list[str]:
    """Names that have, or had, a process."""
    return sorted(path.stem for path in runtime.glob("*.pid"))


def _signal_and_wait(pid: int) -> None:
    """SIGTERM lets it flush and close; SIGKILL when that takes too long."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(descriptor, number)
            if poll.poll(END_MAX_S * 1000):
                return
        log.error("export.does_not_end", pid=pid)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)
