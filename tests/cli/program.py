"""The program as its users run it: a process that is started, asked, signalled and waited for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.patience import PATIENCE_S

INSTAR = [sys.executable, "-m", "instar.cli"]


def instar(*arguments: str | Path, timeout_s: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*INSTAR, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, check=False,
        env=os.environ | variables,
    )  # fmt: skip


class Up:
    """A running `instar up`. `said` is its standard output so far, `log` the file with its standard error."""

    def __init__(self, directory: Path, log: Path, *options: str) -> None:
        self.directory = directory
        self.log = log
        self.said = ""
        command = [*INSTAR, "up", "--dir", str(directory), "--port", "0", *options]
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)

    def wait_until_ready(self) -> str:
        """The URL of the ready line."""
        deadline = time.monotonic() + PATIENCE_S
        assert self.process.stdout is not None
        while time.monotonic() < deadline:
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                self.said += os.read(self.process.stdout.fileno(), 65_536).decode()
            for line in self.said.splitlines(keepends=True):
                if line.startswith("ready: ") and line.endswith("\n"):
                    return line.removeprefix("ready: ").strip()
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.log.read_text()}")
        raise AssertionError(f"not ready:\n{self.log.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@contextmanager
def running(directory: Path, log: Path, *options: str) -> Iterator[Up]:
    """An `instar up` that answers; ended whatever happens."""
    up = Up(directory, log, *options)
    try:
        up.wait_until_ready()
        yield up
    finally:
        if up.process.poll() is None:
            up.process.kill()
            up.process.wait(30)
