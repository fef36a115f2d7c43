"""Runs a program of the host under limits: memory, CPU time, wall time. Used for qemu-img and genisoimage.

What copies much data has a limit of its own (`run_copy`), tells how far it is, and ends when nobody wants it any more.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.host_paths import FULL, disk_full
from instar.hypervisor.libvirt.settings import LibvirtSettings

OUTPUT_MAX_BYTES = 1 << 20
COMPLAINT_MAX_BYTES = 2000
LOOK_S = 0.2  # how soon a program is ended that nobody waits for any more

_PERCENT = re.compile(rb"\((\d+)\.\d+/100%\)")

log = structlog.get_logger()


async def run_limited(arguments: list[str], *, settings: LibvirtSettings, host: str, writes_to: Path) -> bytes:
    """The standard output of a program. Raises HypervisorError when it fails or takes too long, and DiskFull for the
    file system of `writes_to` when it says so. The program's own text goes to the log only: it names files."""
    limits = [f"--as={settings.program_memory_mib << 20}", f"--cpu={settings.program_cpu_s}", "--core=0"]
    program = arguments[0]
    try:
        # In a thread: subprocesses of uvloop that start side by side are not reliable (see linux_network/host_commands).
        ended = await asyncio.to_thread(
            subprocess.run,
            ["prlimit", *limits, "--", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=settings.program_timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError as error:
        raise HypervisorError(reason="the host lacks the program prlimit") from error
    except subprocess.TimeoutExpired as error:
        raise HypervisorError(reason=f"{program} took longer than {settings.program_timeout_s:g} seconds") from error
    if ended.returncode:
        await _refuse(program, ended.returncode, ended.stderr, writes_to, host)
    return ended.stdout[:OUTPUT_MAX_BYTES]


async def run_copy(
    arguments: list[str], *, settings: LibvirtSettings, host: str, writes_to: Path, on_percent: Callable[[int], None]
) -> None:
    """A program that copies much data and prints `(12.34/100%)` on the way. `on_percent` is called on the loop. A caller
    that is cancelled waits until the program has ended. Raises as `run_limited` does."""
    loop, stop = asyncio.get_running_loop(), threading.Event()
    deadline = time.monotonic() + settings.copy_timeout_s
    command = ["prlimit", f"--as={settings.program_memory_mib << 20}", "--core=0", "--", *arguments]

    def tell(percent: int) -> None:
        loop.call_soon_threadsafe(on_percent, percent)

    work = asyncio.ensure_future(asyncio.to_thread(_copy, command, stop, deadline, tell))
    try:
        status, complaint = await asyncio.shield(work)
    except FileNotFoundError as error:
        raise HypervisorError(reason="the host lacks the program prlimit") from error
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([work])
        raise
    if status and time.monotonic() > deadline:
        raise HypervisorError(reason=f"{arguments[0]} took longer than {settings.copy_timeout_s:g} seconds")
    if status:
        await _refuse(arguments[0], status, complaint, writes_to, host)


def _copy(
    command: list[str], stop: threading.Event, deadline: float, tell: Callable[[int], None]
) -> tuple[int, bytes]:
    """Blocking: exit status, and what the program complained of. Killed when `stop` is set or its time is over."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},
    ) as process:
        tail = b""
        try:
            output = process.stdout.fileno() if process.stdout is not None else -1
            while not stop.is_set() and time.monotonic() < deadline:
                if not select.select([output], [], [], LOOK_S)[0]:
                    continue
                chunk = os.read(output, 4096)
                if not chunk:
                    return process.wait(), tail
                tail = (tail + chunk)[-COMPLAINT_MAX_BYTES:]
                if percents := _PERCENT.findall(tail):
                    tell(int(percents[-1]))
        finally:
            process.kill()
        return process.wait(), tail


async def _refuse(program: str, status: int, complaint: bytes, writes_to: Path, host: str) -> None:
    """Raises what the failure of a program means."""
    text = complaint[-COMPLAINT_MAX_BYTES:].decode(errors="replace")
    log.warning("program.failed", program=program, status=status, complaint=text)
    if any(os.strerror(number) in text for number in FULL):
        raise await asyncio.to_thread(disk_full, writes_to, host)
    raise HypervisorError(reason=f"{program} failed with status {status}")
