"""Runs a program of the host under limits: memory, CPU time, wall time. Used for qemu-img and genisoimage."""

from __future__ import annotations

import asyncio
import contextlib
import os
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
    try:
        process = await asyncio.create_subprocess_exec(
            "prlimit",
            *limits,
            "--",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise HypervisorError(reason="the host lacks the program prlimit") from error
    program = arguments[0]
    try:
        async with asyncio.timeout(settings.program_timeout_s):
            output, complaint = await process.communicate()
    except TimeoutError as error:
        raise HypervisorError(reason=f"{program} took longer than {settings.program_timeout_s:g} seconds") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        text = complaint[-2000:].decode(errors="replace")
        log.warning("program.failed", program=program, status=process.returncode, complaint=text)
        if any(os.strerror(number) in text for number in FULL):
            raise await asyncio.to_thread(disk_full, writes_to, host)
        raise HypervisorError(reason=f"{program} failed with status {process.returncode}")
    return output[:OUTPUT_MAX_BYTES]
