"""A process that does one operation in many clouds at once, and kills itself when each is at the step that is its own.

`python -m tests.lifecycle.dying DIRECTORY IMAGE NAME STEP…`: the clouds of the n-th step lie in DIRECTORY/before-n (the
step is recorded as begun, nothing is done) and DIRECTORY/after-n (its work is done, its result is not recorded). Prints
`instances` and their ids, those of before first."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from tests.lifecycle.harness import UNHURRIED, prepared
from tests.lifecycle.scenarios import SCENARIOS, victim


async def main(directory: Path, image_file: Path, name: str, steps: list[str]) -> None:
    """A step is held until the last cloud is at its own."""
    reached, ids = [], []
    async with AsyncExitStack() as stack:
        for when in ("before", "after"):
            for number, step in enumerate(steps):
                place = directory / f"{when}-{number}"
                one = await stack.enter_async_context(prepared(place, image_file, UNHURRIED))
                instance = await victim(one, SCENARIOS[name])
                reached.append(asyncio.Event())
                one.around_step = _stop_at(step, when, reached[-1])
                ids.append((await SCENARIOS[name].act(one, instance)).id)
        print("instances", *ids, flush=True)
        for event in reached:
            await event.wait()
        os.kill(os.getpid(), signal.SIGKILL)


def _stop_at(
    step: str, when: str, reached: asyncio.Event
) -> Callable[[str, Callable[[], Awaitable[object]]], Awaitable[object]]:
    async def stop(name: str, call: Callable[[], Awaitable[object]]) -> object:
        if name != step:
            return await call()
        if when == "after":
            await call()
        reached.set()
        await asyncio.Event().wait()
        return None

    return stop


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
