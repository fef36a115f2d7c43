"""How fast the machine is just now: its clock changes with what else its host does, by half and more."""

from __future__ import annotations

import time

TURNS = 3_000_000
TRIES = 5


def fixed_loop_ms() -> float:
    """CPU time of a fixed piece of work, the best of some tries."""
    return min(_loop_s() for _ in range(TRIES)) * 1000


def _loop_s() -> float:
    begun, total = time.process_time(), 0
    for turn in range(TURNS):
        total += turn * turn % 7
    return time.process_time() - begun
