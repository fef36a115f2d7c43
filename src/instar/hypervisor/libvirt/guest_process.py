"""The QEMU process of a guest: libvirt says no more of it than its pid file does. `questions.py` calls it."""

from __future__ import annotations

import os
import time
from pathlib import Path

SYSTEM_RUN = Path("/run/libvirt/qemu")  # of the system's own libvirtd; a private one has its own folder


def uptime_s(name: str, runtime: Path) -> int | None:
    """Whole seconds since the process of the domain of this name was started; None where it is not found.

    A guest that was migrated live here counts from then. Blocking, for a moment."""
    for folder in (runtime / "run" / "qemu", SYSTEM_RUN):
        try:
            pid = int((folder / f"{name}.pid").read_text(encoding="ascii"))
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (OSError, ValueError):
            continue
        # Field 22 of proc(5), in ticks since the machine was started; the name before it may have blanks and brackets.
        started_ticks = int(stat.rpartition(")")[2].split()[19])
        return max(0, int(time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")))
    return None
