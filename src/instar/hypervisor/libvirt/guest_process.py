"""How long a guest's QEMU process has been running, which libvirt does not tell. `questions.py` calls it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

PROC = Path("/proc")


def uptime_s(instance_id: str) -> int | None:
    """Whole seconds since the guest's process was started; None where it is not found. Blocking, for some milliseconds.

    A guest that was migrated live counts from its arrival."""
    named = f"\0-uuid\0{instance_id}\0".encode()
    ages = []
    for process in PROC.iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
                if named in (process / "cmdline").read_bytes():
                    ages.append(_age_s(process))
    return max(ages, default=None)


def _age_s(process: Path) -> int:
    stat = (process / "stat").read_text(encoding="utf-8", errors="replace")
    # Field 22 of proc(5), in ticks since the machine was started; the name before it may have blanks and brackets.
    started_ticks = int(stat.rpartition(")")[2].split()[19])
    return max(0, int(time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")))
