"""Whether KVM really works on this host. The driver asks once; the answer holds for the life of the process.

/dev/kvm alone proves nothing: where the CPU has no vmx or svm, a guest of type kvm hangs. So: the CPU's flags, then the
device's own answer, then a guest of one boot sector that must end with its own exit code within a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import tempfile
from pathlib import Path

import structlog

EMULATOR = "qemu-system-x86_64"
TEST_GUEST_TIMEOUT_S = 10.0
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12
DISK_BYTES = 1 << 20  # the firmware does not boot from a disk of a single sector
EXIT_STATUS = 33  # isa-debug-exit ends QEMU with (value << 1) | 1

# mov al, 0x10; out 0xf4, al; hlt; jmp to the hlt. Then the signature of a boot sector.
_BOOT_SECTOR = bytes.fromhex("b010e6f4f4ebfd").ljust(510, b"\0") + b"\x55\xaa"

log = structlog.get_logger()

_answer: str | None = None


async def virt_type() -> str:
    """``kvm`` when a guest really ran under it, else ``qemu``."""
    global _answer
    if _answer is None:
        reason = await _why_no_kvm()
        _answer = "qemu" if reason else "kvm"
        log.info("acceleration.found", virt_type=_answer, reason=reason)
    return _answer


async def _why_no_kvm() -> str:
    """Empty when KVM works."""
    flags = await asyncio.to_thread(Path("/proc/cpuinfo").read_text)
    if not cpu_can_virtualise(flags):
        return "the CPU has neither vmx nor svm"
    if not await asyncio.to_thread(device_answers, Path("/dev/kvm")):
        return "/dev/kvm does not answer"
    if not await test_guest_runs("kvm"):
        return "a test guest did not run"
    return ""


def cpu_can_virtualise(cpuinfo: str) -> bool:
    """The text of /proc/cpuinfo names a virtualisation extension of an x86 CPU."""
    return re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo, re.MULTILINE) is not None


def device_answers(device: Path) -> bool:
    """The device may be opened and speaks the one version of the KVM API there is. Blocking."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(descriptor, KVM_GET_API_VERSION) == KVM_API_VERSION
    except OSError:
        return False
    finally:
        os.close(descriptor)


async def test_guest_runs(accelerator: str, *, timeout_s: float = TEST_GUEST_TIMEOUT_S) -> bool:
    """A guest of one boot sector ran under `accelerator` (kvm, tcg) and ended by itself within the time."""
    with tempfile.NamedTemporaryFile(prefix="instar-kvm-test-") as disk:
        disk.write(_BOOT_SECTOR.ljust(DISK_BYTES, b"\0"))
        disk.flush()
        arguments = ["-machine", "q35", "-accel", accelerator, "-m", "16", "-nodefaults", "-no-user-config"]
        arguments += ["-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        arguments += ["-drive", f"file={disk.name},format=raw,if=virtio,readonly=on"]
        try:
            process = await asyncio.create_subprocess_exec(
                EMULATOR,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except FileNotFoundError:
            return False
        try:
            async with asyncio.timeout(timeout_s):
                return await process.wait() == EXIT_STATUS
        except TimeoutError:
            return False
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
