"""The serial console's log of a guest: read by its end, and kept bounded.

QEMU appends to console.log for as long as the guest talks. A log that has grown beyond its limit is cut: its end goes to
console.previous, and the file is emptied in place (QEMU has it open in append mode, so it goes on at the start). What the
guest prints in the very moment of the cut may be lost; a guest that fills the host's disk would be worse.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.settings import LibvirtSettings

log = structlog.get_logger()

PREVIOUS = "console.previous"


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
        for instance_id in await asyncio.to_thread(paths.instance_ids):
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
