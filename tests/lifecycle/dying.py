"""A process that does one operation in many clouds at once, and kills itself when each is at the step that is its own.

`python -m tests.lifecycle.dying DIRECTORY IMAGE NAME WHEN STEP…`: the cloud of the n-th step lies in DIRECTORY/n. Prints
`instances` and their ids, in that order. WHEN is before (the step is recorded as begun, nothing is done) or after (its work
is done, its result is not recorded)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from tests.lifecycle.harness import SETTINGS, plane
from tests.lifecycle.scenarios import SCENARIOS, victim

# A step is held until the last cloud is at its own.
HELD_MAX_S = 60.0


async def main(directory: Path, image_file: Path, name: str, when: str, steps: list[str]) -> None:
    engine = msgspec.structs.replace(SETTINGS.engine, step_deadline_s=HELD_MAX_S)
    settings = msgspec.structs.replace(SETTINGS, engine=engine)
    reached = [asyncio.Event() for _ in steps]
    async with AsyncExitStack() as stack:
        ids = []
        for number, step in enumerate(steps):
            one = await stack.enter_async_context(plane(directory / str(number), settings))
            await one.prepare(image_file)
            instance = await victim(one, SCENARIOS[name])
            one.around_step = _stop_at(step, when, reached[number])
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
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:]))
