"""The unmodified openstackclient in its interactive mode: one process for many commands, each a second cheaper."""

from __future__ import annotations

import json
import os
import selectors
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OPENSTACK = Path(sys.executable).with_name("openstack")
COMMAND_MAX_S = 300.0


class CommandFailed(AssertionError):
    """What the client said instead of doing what it was told."""


class OpenstackShell:
    """Runs commands one after the other, as one user. Commands are given as on a command line, without `openstack`."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [OPENSTACK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self._count = 0
        self._buffer = b""

    def said(self, *words: str) -> str:
        """What the client printed for this command, answers and complaints alike."""
        self._count += 1
        marker = f"==done {self._count}=="
        assert self._process.stdin is not None
        self._process.stdin.write(f"{shlex.join(words)}\n!echo {marker}\n".encode())
        self._process.stdin.flush()
        return self._until(f"{marker}\n".encode()).decode()

    def do(self, command: str, *more: str) -> str:
        """Run a command that answers nothing. `more`: further words, without blanks, at which the client would split them.

        Raises CommandFailed when it complains."""
        output = self.said(*command.split(), *more).strip()
        if output:
            raise CommandFailed(f"{command}: {output}")
        return output

    def show(self, command: str, *more: str) -> Any:
        """The command's answer, read from JSON. Raises CommandFailed when it is none."""
        output = self.said(*command.split(), *more, "-f", "json")
        try:
            return json.loads(output)
        except ValueError:
            pass
        start = output.find("\n{")  # `--wait` prints its progress first
        try:
            return json.loads(output[start:])
        except ValueError:
            raise CommandFailed(f"{command}: {output}") from None

    def names(self, command: str, column: str = "Name") -> list[str]:
        return [row[column] for row in self.show(command)]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def _until(self, marker: bytes) -> bytes:
        deadline = time.monotonic() + COMMAND_MAX_S
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while marker not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise CommandFailed(f"no answer within {COMMAND_MAX_S:g} s; so far: {self._buffer!r}")
                chunk = os.read(self._process.stdout.fileno(), 65_536)
                if not chunk:
                    raise CommandFailed(f"the client ended: {self._buffer!r}")
                self._buffer += chunk
        output, _, self._buffer = self._buffer.partition(marker)
        return output


def run_openstack(environ: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, for what depends on exit codes."""
    return subprocess.run(
        [OPENSTACK, *words], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=COMMAND_MAX_S, check=False,
    )  # fmt: skip
