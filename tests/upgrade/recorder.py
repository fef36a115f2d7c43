"""Records a version: `python -m tests.upgrade.recorder IMAGE`, once, before the next version begins.

Writes `recorded/VERSION/messages.json` and `recorded/VERSION/cloud.tar.xz`: the directory of a cloud on simulated hosts
whose process was killed with an operation of many kinds in flight, some before the work of a step, some after it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from instar import __version__
from instar.config import QuotaSettings
from instar.model.instance import Instance
from tests.lifecycle.dying import _stop_at
from tests.lifecycle.harness import SETTINGS, plane
from tests.lifecycle.scenarios import SCENARIOS, victim
from tests.patience import PATIENCE_S
from tests.upgrade.records import samples_now, shapes_now

RECORDED = Path(__file__).parent / "recorded"
ROOMY = msgspec.structs.replace(SETTINGS, quota=QuotaSettings(instances=-1, cores=-1, ram=-1))
# Scenario → the step at which its operation is when the process is killed, and whether its work is done by then.
IN_FLIGHT = {
    "create": ("create root disk", "after"),
    "reboot-hard": ("restart guest", "after"),
    "stop": ("stop guest", "before"),
    "image": ("copy disk", "before"),
    "shelve": ("remove guest", "before"),
    "unshelve": ("start guest", "after"),
    "resize": ("fetch disks", "after"),
    "migrate": ("start guest", "before"),
    "confirm": ("release old claim", "before"),
    "revert": ("bring disks back", "after"),
    "rebuild": ("start guest", "before"),
    "rescue": ("start guest", "before"),
    "live-migrate": ("migrate guest", "after"),
    "delete": ("remove guest", "after"),
    "attach-interface": ("plug interface", "after"),
    "suspend": ("save memory", "after"),
}


async def in_flight(directory: Path, image_file: Path) -> None:
    """Bring every operation to its step, note which is which, and die."""
    async with plane(directory, ROOMY) as one:
        await one.prepare(image_file)
        victims: dict[str, Instance | None] = {}
        for name in IN_FLIGHT:
            victims[name] = await victim(one, SCENARIOS[name])
        noted = {}
        for name, (step, when) in IN_FLIGHT.items():
            reached = asyncio.Event()
            one.around_step = _stop_at(step, when, reached)
            instance = await SCENARIOS[name].act(one, victims[name])
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await reached.wait()
            except TimeoutError:
                steps = [step.name for step in await one.journal(instance.id)]
                raise RuntimeError(f"{name} did not come to '{step}': {steps}") from None
            noted[name] = instance.id
        (directory / "noted.json").write_text(json.dumps(noted, indent=1))
        os.kill(os.getpid(), signal.SIGKILL)


def pack(directory: Path, to: Path) -> None:
    database = sqlite3.connect(directory / "instar.db")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.execute("VACUUM")
    database.close()
    with tarfile.open(to, "w:xz", preset=9) as archive:
        for path in sorted(directory.rglob("*")):
            name = str(path.relative_to(directory))
            if path.is_file() and path.suffix not in (".sock", ".db-wal", ".db-shm") and name != "lock":
                info = tarfile.TarInfo(name)
                data = path.read_bytes()
                info.size, info.mode = len(data), 0o600
                archive.addfile(info, io.BytesIO(data))


def main(arguments: list[str]) -> None:
    if arguments[0] == "in-flight":
        asyncio.run(in_flight(Path(arguments[1]), Path(arguments[2])))
        return
    to = RECORDED / __version__
    to.mkdir(parents=True, exist_ok=True)
    messages: dict[str, Any] = {"version": __version__, "shapes": shapes_now(), "samples": samples_now()}
    (to / "messages.json").write_text(json.dumps(messages, indent=1, sort_keys=True) + "\n")
    with tempfile.TemporaryDirectory(prefix="instar-recorded-") as directory:
        # Another process, so that its end is as sudden as that of a program which is replaced while it works.
        argv = [sys.executable, "-m", "tests.upgrade.recorder", "in-flight", directory, arguments[0]]
        died = subprocess.run(argv, check=False)
        if died.returncode != -signal.SIGKILL:
            raise SystemExit(f"the cloud was not brought to where it should die: {died.returncode}")
        pack(Path(directory), to / "cloud.tar.xz")


if __name__ == "__main__":
    main(sys.argv[1:])
