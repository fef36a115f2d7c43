"""A guest's consoles, and the serial one's log: offered to other hosts, read by its end, and kept bounded.

The driver opens and calls them; each start of a guest bounds its log too.

QEMU appends to console.log for as long as the guest talks. A log that has grown beyond its limit is cut: its end goes to
console.previous, and the file is emptied in place (QEMU has it open in append mode, so it goes on at the start). What the
guest prints in the very moment of the cut may be lost; a guest that fills the host's disk would be worse.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from instar.errors import ConsoleUnavailable, HypervisorError, NoRunningGuest
from instar.hypervisor.console_offer import console_name, grant_console
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.stream_peers import StreamGrants
from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.guest import GuestState
from instar.model.stream import StreamAddress

log = structlog.get_logger()

PREVIOUS = "console.previous"
CONSOLE_SOCKETS = {ConsoleKind.VNC: "vnc.sock", ConsoleKind.SERIAL: "console.sock"}


class GuestConsoles:
    """Of all guests of one host. `observe` gives the state of a guest; without `streams` no console is offered."""

    def __init__(
        self,
        paths: HostPaths,
        streams: StreamGrants | None,
        *,
        observe: Callable[[str], Awaitable[GuestState]],
        settings: LibvirtSettings,
    ) -> None:
        self._paths, self._streams, self._observe, self._settings = paths, streams, observe, settings
        self._sweeper: asyncio.Task[None] | None = None

    def open(self) -> None:
        """From now on the logs are kept bounded."""
        self._sweeper = asyncio.create_task(sweep(self._paths, self._settings), name="console-sweep")

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    async def read(self, instance_id: str, *, length_bytes: int) -> bytes:
        length = min(length_bytes, self._settings.console_read_max_bytes)
        return await asyncio.to_thread(read_tail, self._paths.console_log(instance_id), length)

    async def offer(self, instance_id: str, kind: ConsoleKind, to: StreamAddress | None) -> ConsoleOffer:
        """Raises ConsoleUnavailable, NoRunningGuest."""
        if self._streams is None:
            raise ConsoleUnavailable(kind=kind.value)
        if (await self._observe(instance_id)).domain_id is None:
            raise NoRunningGuest(id=instance_id)
        if to is None:
            return ConsoleOffer(self._streams.address, console_name(instance_id, kind))
        path = await asyncio.to_thread(self._paths.socket, instance_id, CONSOLE_SOCKETS[kind])
        return grant_console(self._streams, instance_id, kind, path, to)


def read_tail(console_log: Path, length_bytes: int) -> bytes:
    """The last bytes of the log, over a cut if need be; empty when there is none. Blocking."""
    if length_bytes <= 0:
        return b""
    tail = _tail_of(console_log, length_bytes)
    if len(tail) < length_bytes:
        tail = _tail_of(console_log.with_name(PREVIOUS), length_bytes - len(tail)) + tail
    return tail


def bound_log(console_log: Path, *, max_bytes: int, keep_bytes: int) -> bool:
    """Cut the log when it is longer than `max_bytes`, keeping its last `keep_bytes`. True when it was cut. Blocking."""
    try:
        if console_log.stat().st_size <= max_bytes:
            return False
        kept = _tail_of(console_log, keep_bytes)
        part = console_log.with_name(PREVIOUS + ".part")
        try:
            part.write_bytes(kept)
            os.replace(part, console_log.with_name(PREVIOUS))  # noqa: PTH105 - overwrites
        except OSError:
            part.unlink(missing_ok=True)  # no room to keep it: cutting matters more
        os.truncate(console_log, 0)
    except FileNotFoundError:
        return False
    return True


def bound(console_log: Path, limits: LibvirtSettings) -> None:
    """Blocking."""
    if bound_log(console_log, max_bytes=limits.console_log_max_bytes, keep_bytes=limits.console_log_keep_bytes):
        log.info("console.cut", instance=console_log.parent.name)


async def sweep(paths: HostPaths, limits: LibvirtSettings) -> None:
    """Keeps the logs of all instances bounded; runs until it is cancelled."""
    while True:
        await asyncio.sleep(limits.console_sweep_s)
        try:
            instance_ids = await asyncio.to_thread(paths.instance_ids)
        except OSError as error:  # no file can be opened at this moment, for example: next time
            log.warning("console.sweep_failed", error=type(error).__name__, errno=error.errno)
            continue
        for instance_id in instance_ids:
            try:
                await asyncio.to_thread(bound, paths.console_log(instance_id), limits)
            except (OSError, HypervisorError) as error:
                log.warning("console.sweep_failed", instance=instance_id, error=type(error).__name__)


def _tail_of(path: Path, length_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - length_bytes))
            return file.read(length_bytes)
    except FileNotFoundError:
        return b""
