"""Runs a program of the host under limits: memory, CPU time, wall time. Used for qemu-img and genisoimage."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import structlog

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.host_paths import FULL, disk_full
from instar.hypervisor.libvirt.settings import LibvirtSettings

OUTPUT_MAX_BYTES = 1 << 20

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
        text = ended.stderr[-2000:].decode(errors="replace")
        log.warning("program.failed", program=program, status=ended.returncode, complaint=text)
        if any(os.strerror(number) in text for number in FULL):
            raise await asyncio.to_thread(disk_full, writes_to, host)
        raise HypervisorError(reason=f"{program} failed with status {ended.returncode}")
    return ended.stdout[:OUTPUT_MAX_BYTES]
