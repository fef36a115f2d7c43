"""The serial line of simulated guests: a unix socket that shows the console's log and goes on with it. Used by the driver.

What is typed is read and means nothing to a simulated guest. A socket is there for one connection, and for a short time.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from pathlib import Path

from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.socket_folder import SocketFolder

READ_BYTES = 4096
LOOK_EVERY_S = 60.0  # a change wakes us at once; this is for the client that went away without a word


class SerialConsoles:
    """Of one simulated host. The folder of the sockets is made with the first one."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._folder: SocketFolder | None = None
        self._waiting: dict[Path, tuple[asyncio.AbstractServer, asyncio.TimerHandle]] = {}
        self._sessions: set[asyncio.Task[None]] = set()

    async def open(self, instance_id: str, *, valid_s: float) -> Path:
        """A socket that takes one connection within that time."""
        if self._folder is None:
            self._folder = await asyncio.to_thread(SocketFolder)
        path = self._folder.path / secrets.token_hex(8)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._take_away(path)
            session = asyncio.current_task()
            assert session is not None
            self._sessions.add(session)
            session.add_done_callback(self._sessions.discard)
            await self._serve(instance_id, reader, writer)

        server = await asyncio.start_unix_server(connected, path)
        timer = asyncio.get_running_loop().call_later(valid_s, self._take_away, path)
        self._waiting[path] = (server, timer)
        return path

    async def close(self) -> None:
        for path in list(self._waiting):
            self._take_away(path)
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(folder.remove)

    def _take_away(self, path: Path) -> None:
        if (waiting := self._waiting.pop(path, None)) is not None:
            server, timer = waiting
            timer.cancel()
            server.close()
            path.unlink(missing_ok=True)

    async def _serve(self, instance_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks = {
            asyncio.create_task(self._show(instance_id, writer)),
            asyncio.create_task(_ignore_input(reader)),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _show(self, instance_id: str, writer: asyncio.StreamWriter) -> None:
        """All of the log, then what is added, until the guest no longer runs."""
        shown = 0
        domain_id = self._machine.state_of(instance_id).domain_id
        while (directory := self._machine.directories.get(instance_id)) is not None:
            shown = min(shown, directory.written)  # what moved away and came back starts its log anew
            new = min(directory.written - shown, len(directory.console))
            if new:
                writer.write(bytes(directory.console[-new:]).replace(b"\n", b"\r\n"))
                shown = directory.written
                await writer.drain()
                continue
            if domain_id is None or self._machine.state_of(instance_id).domain_id != domain_id:
                return
            await self._machine.wait_for_change(instance_id, LOOK_EVERY_S)


async def _ignore_input(reader: asyncio.StreamReader) -> None:
    while await reader.read(READ_BYTES):
        pass
