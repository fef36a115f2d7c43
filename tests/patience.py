"""How much longer things take because the machine does other things, too: limits of tests are those of an idle one."""

from __future__ import annotations

import os

MOST = 10.0
SLOW_MACHINE = 3.0
PATIENCE_S = 90.0  # for what takes a moment on an idle machine: it ends a test that waits in vain, and measures nothing


def slowness() -> float:
    """By which to multiply a duration: 1 on an idle machine, 3 where each processor has two others' work to do as well."""
    return min(MOST, 1 + os.getloadavg()[0] / (os.cpu_count() or 1))


def patience() -> float:
    """By which to multiply a limit. Never 1: load is known a while after it came, and there are slower machines."""
    return SLOW_MACHINE * slowness()
