"""The shell on the guest's serial line, through a remote console as any user has it: how the demo looks into the guest."""

from __future__ import annotations

import re
import secrets
import time

from openstack.connection import Connection
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from instar.cli.demo.guest import DemoFailed

OPEN_TIMEOUT_S = 30.0
ANSWER_DEADLINE_S = 90.0
TYPE_AGAIN_S = 3.0
MESSAGE_MAX_BYTES = 1 << 20


def run_in_guest(connection: Connection, server_id: str, command: str) -> str:
    """What `command` prints in the guest, stripped. Blocking.

    Raises DemoFailed when the shell does not answer, or the command fails."""
    console = connection.compute.create_console(server_id, "serial", "serial")
    if console is None:
        raise DemoFailed("The server has no serial console.")
    url = console["url"]
    try:
        with connect(url, subprotocols=["binary"], open_timeout=OPEN_TIMEOUT_S, max_size=MESSAGE_MAX_BYTES) as line:  # type: ignore[list-item]
            return _Line(line).run(command)
    except (ConnectionClosed, WebSocketException, OSError) as error:
        raise DemoFailed(f"The serial line was closed on `{command}`: {error}") from error


class _Line:
    def __init__(self, line: ClientConnection) -> None:
        self._line = line
        self._seen = ""
        self._mark = secrets.token_hex(4)
        self._deadline = time.monotonic() + ANSWER_DEADLINE_S

    def run(self, command: str) -> str:
        # What is typed is echoed: the quotes keep the echo from looking like the answer.
        mark = self._mark
        self._type_until_answered(f"echo he''re-{mark}", f"here-{mark}")
        self._line.send(f"echo be''gin-{mark}; {command}; echo e''nd-{mark}-$?\r".encode())
        wanted = re.compile(rf"begin-{mark}\r?\n(.*?)end-{mark}-(\d+)", re.DOTALL)
        while (found := wanted.search(self._seen)) is None:
            self._read(ANSWER_DEADLINE_S)
        output = found.group(1).replace("\r", "").strip()
        if found.group(2) != "0":
            raise DemoFailed(f"`{command}` failed in the guest: {output or found.group(2)}")
        return output

    def _type_until_answered(self, line: str, answer: str) -> None:
        """A guest that has just booted may not have opened its serial line yet, and what is typed is lost then."""
        while answer not in self._seen:
            self._line.send(f"{line}\r".encode())
            again_at = time.monotonic() + TYPE_AGAIN_S
            while answer not in self._seen and (left_s := again_at - time.monotonic()) > 0:
                self._read(left_s)

    def _read(self, at_most_s: float) -> None:
        if time.monotonic() > self._deadline:
            raise DemoFailed(f"The shell on the serial line did not answer within {ANSWER_DEADLINE_S:g} s.")
        try:
            data = self._line.recv(timeout=min(at_most_s, 1.0))
        except TimeoutError:
            return
        self._seen += data.decode(errors="replace") if isinstance(data, bytes) else data
