"""The monitor of a storage daemon: its commands, as JSON over a Unix socket. Blocking: called in threads.

A monitor hears one client at a time, the next waits until that one is gone: so a connection is made for a few commands and
closed again, and nobody waits on one for the end of a job.
"""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from instar.errors import InstarError

CALL_MAX_S = 20.0
_LINE_MAX_BYTES = 8 << 20


class MonitorError(InstarError):
    """The process refused a command, or does not answer. `description` is the process's own text: for the log."""

    template = "The export process failed: {description}"


class Monitor:
    """`with Monitor(path) as monitor: monitor.call("query-status")`. Raises MonitorError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(CALL_MAX_S)
        self._received = bytearray()

    def __enter__(self) -> Monitor:
        try:
            self._socket.connect(str(self._path))
            self._line()
        except OSError as error:
            self._socket.close()
            raise MonitorError(description=str(error)) from error
        except MonitorError:
            self._socket.close()
            raise
        self.call("qmp_capabilities")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """The command's answer; underscores in the names of arguments stand for hyphens."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._socket.sendall(msgspec.json.encode({"execute": command, "arguments": given}) + b"\n")
            while True:
                answer = self._line()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise MonitorError(description=f"{command}: {answer['error'].get('desc')}")
        except OSError as error:
            raise MonitorError(description=f"{command}: {error}") from error

    def _line(self) -> dict[str, Any]:
        while (end := self._received.find(b"\n")) < 0:
            data = self._socket.recv(65536)
            if not data or len(self._received) > _LINE_MAX_BYTES:
                raise MonitorError(description="the monitor was closed")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        decoded: dict[str, Any] = msgspec.json.decode(line)
        return decoded
