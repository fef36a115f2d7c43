"""The demo's cloud: `instar up` as a process of its own in a fresh directory, and its removal to the last trace."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from instar.cli.demo.footprint import Footprint
from instar.cli.state_dir import MODE, StateDir
from instar.errors import StartupError

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0
DOWN_DEADLINE_S = 120.0
GONE_DEADLINE_S = 5.0
READY = b"ready: "
POLL_S = 0.2
LOG_LINES_SHOWN = 25


class DemoCloud:
    """Made by `start`, and always ended by `remove`, whatever happened in between. `distributed`: of many processes."""

    def __init__(self, hosts: int, *, distributed: bool = False) -> None:
        self._hosts = hosts
        self._distributed = distributed
        self.directory = Path(tempfile.mkdtemp(prefix="instar-demo-"))
        self.directory.chmod(MODE)  # the hypervisor's processes pass through
        self.state = StateDir(self.directory)
        self.footprint = Footprint(self.directory, self.state.cloud_id)
        self.url = ""
        self._log = self.directory / "up.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Blocking, until it answers. Raises StartupError."""
        command = [sys.executable, "-m", "instar.cli", *self._verb("up"), "--hosts", str(self._hosts)]
        command += [] if self._distributed else ["--port", "0"]
        with self._log.open("w") as log:
            # A session of its own: Ctrl-C is for the demo, which then stops the cloud in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.url = self._wait_until_ready(self._process)

    def _verb(self, verb: str) -> list[str]:
        return [*(["distributed"] if self._distributed else []), verb, "--dir", str(self.directory)]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        deadline, said = time.monotonic() + START_DEADLINE_S, b""
        while time.monotonic() < deadline:
            if select.select([process.stdout], [], [], POLL_S)[0]:
                said += os.read(process.stdout.fileno(), 65_536)
            for line in said.splitlines(keepends=True):
                if line.startswith(READY) and line.endswith(b"\n"):
                    return line.removeprefix(READY).decode().strip()
            if process.poll() is not None:
                raise StartupError("The cloud did not start: see its log above.")
        raise StartupError(f"The cloud did not answer within {START_DEADLINE_S:g} seconds.")

    def log_end(self) -> str:
        """The last lines of the cloud's log; of many processes, those of each."""
        logs = [self._log, *sorted((self.directory / "log").glob("*.log"))]
        return "\n".join(f"{log.name}:\n{_end_of(log)}" if len(logs) > 1 else _end_of(log) for log in logs)

    def remove(self, say: Callable[[str], None]) -> list[str]:
        """Stop the cloud, end its guests, remove its networks, its libvirtd and its directory. What is left, if any."""
        self._stop()
        if not self._down(say):
            self.footprint.end_by_force()
        shutil.rmtree(self.directory, ignore_errors=True)
        return self._wait_until_gone()

    def _down(self, say: Callable[[str], None]) -> bool:
        # A process of its own can be given up: a libvirtd that hangs would hold a thread of ours for ever.
        command = [sys.executable, "-m", "instar.cli", *self._verb("down")]
        try:
            down = subprocess.run(command, capture_output=True, text=True, timeout=DOWN_DEADLINE_S, check=False)
        except subprocess.TimeoutExpired:
            say(f"removing the cloud did not end within {DOWN_DEADLINE_S:g} seconds")
            return False
        if down.returncode != 0:
            say(f"removing the cloud failed: {down.stderr.strip()}")
        return down.returncode == 0

    def _wait_until_gone(self) -> list[str]:
        """What is still there after a while: processes that were ended are reaped by others."""
        deadline = time.monotonic() + GONE_DEADLINE_S
        while (left := self.footprint.found()) and time.monotonic() < deadline:
            time.sleep(0.1)
            # Again: a Ctrl-C in the very moment of the start leaves a process that still wrote while it was removed.
            shutil.rmtree(self.directory, ignore_errors=True)
        return left

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_DEADLINE_S)
        finally:
            if process.stdout is not None:
                process.stdout.close()


def _end_of(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    except OSError:
        return ""
