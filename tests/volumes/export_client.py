"""A real NBD client of exports: qemu-io."""

from __future__ import annotations

import asyncio
import subprocess

from instar.model.volume import VolumeConnection
from tests.patience import PATIENCE_S


async def qemu_io(connection: VolumeConnection, *commands: str) -> str:
    """What qemu-io says to these commands on the export. AssertionError where one fails."""
    options = [word for command in commands for word in ("-c", command)]
    opened = f"driver=nbd,server.type=unix,server.path={connection.socket},export={connection.export}"
    read_only = ["-r"] if connection.read_only else []
    ended = await asyncio.to_thread(
        subprocess.run, ["qemu-io", *read_only, "--image-opts", opened, *options],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0 and "failed" not in said and "error" not in said.lower(), said
    return said
