"""A process that does one operation and kills itself at a step: `python -m tests.lifecycle.dying DIR IMAGE NAME STEP WHEN`.

Prints the id of the instance before. WHEN is before (the step is recorded as begun, nothing is done) or after (its work
is done, its result is not recorded)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.lifecycle.harness import plane
from tests.lifecycle.scenarios import SCENARIOS, victim


async def main(directory: Path, image_file: Path, name: str, step: str, when: str) -> None:
    scenario = SCENARIOS[name]
    told = asyncio.Event()

    async def die(reached: str, call: Callable[[], Awaitable[object]]) -> object:
        if reached != step:
            return await call()
        await told.wait()
        if when == "after":
            await call()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    async with plane(directory) as one:
        await one.prepare(image_file)
        instance = await victim(one, scenario)
        one.around_step = die
        changed = await scenario.act(one, instance)
        print(changed.id, flush=True)
        told.set()
        await one.settled()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
