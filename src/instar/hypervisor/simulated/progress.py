"""The time that moving data takes on a simulated host, and what is told meanwhile. Used by disks, moves and devices."""

from __future__ import annotations

import asyncio

from instar.hypervisor.contract import Report
from instar.model.guest import WorkProgress

_PARTS = 4


async def take_time(duration_s: float, instance_id: str, report: Report) -> None:
    """Take that time, and report on the way. The end is reported by who has done the work."""
    if not duration_s:
        return
    for part in range(_PARTS):
        report(WorkProgress(instance_id, 100 * part // _PARTS))
        await asyncio.sleep(duration_s / _PARTS)
