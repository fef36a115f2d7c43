"""A cloud of its own for a measurement: `instar up` in a temporary directory, ended and removed whatever happens."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.http_client import Connection, token_of

READY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
DOWN_DEADLINE_S = 120.0
SIMULATED_HOSTS = 4


class Cloud:
    """One `instar up`. `start` may be called again after `kill` or `stop`: the directory stays."""

    def __init__(self, directory: Path, hypervisor: str, hosts: int | None, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self.url = ""
        self.token = ""
        self.first_start_s = 0.0
        self._environ = dict(environ)
        self._arguments = ["up", "--dir", str(directory), "--port", "0", "--hypervisor", hypervisor]
        if hypervisor == "simulated" or hosts is not None:
            self._arguments += ["--hosts", str(hosts or SIMULATED_HOSTS)]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> float:
        """Seconds from the start of the program to its first answer to a request."""
        began = time.perf_counter()
        with (self.directory / "up.log").open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "instar.cli", *self._arguments,
                stdout=asyncio.subprocess.PIPE, stderr=errors, env={**os.environ, **self._environ},
            )  # fmt: skip
        assert self._process.stdout is not None
        async with asyncio.timeout(READY_DEADLINE_S):
            while True:
                line = (await self._process.stdout.readline()).decode()
                if not line:
                    raise RuntimeError(f"instar up ended: {(self.directory / 'up.log').read_text()[-2000:]}")
                if line.startswith("ready: "):
                    break
        self.url = line.split()[1].strip()
        first = Connection(self.url)
        await first.json("GET", "/compute/")
        took = time.perf_counter() - began
        await first.close()
        clouds: dict[str, Any] = yaml.safe_load((self.directory / "clouds.yaml").read_text())
        self.token, _ = await token_of(self.url, clouds["clouds"]["instar"])
        return took

    def connect(self, *, microversion: str = "") -> Connection:
        return Connection(self.url, self.token, microversion=microversion)

    @property
    def resident_mib(self) -> float:
        assert self._process is not None
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    @property
    def cpu_s(self) -> float:
        """User and system time of the process so far."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def written_bytes(self) -> int:
        """What the process, its threads and the programs that it ran and waited for have written to storage so far: the
        kernel adds what a program has written to its parent's account when the parent takes note of its end."""
        assert self._process is not None
        account = Path(f"/proc/{self._process.pid}/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in account if line.startswith("write_bytes:"))

    async def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def stop(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_DEADLINE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def cloud(
    hypervisor: str = "simulated", *, hosts: int | None = None, environ: Mapping[str, str] | None = None
) -> AsyncIterator[Cloud]:
    """A running cloud without quotas. Afterwards nothing of it is left."""
    directory = Path(tempfile.mkdtemp(prefix="instar-bench-"))
    unlimited = {
        "INSTAR_QUOTA_INSTANCES": "-1", "INSTAR_QUOTA_CORES": "-1", "INSTAR_QUOTA_RAM": "-1",
        "INSTAR_NETWORK_PORTS": "-1", "INSTAR_IDENTITY_TOKEN_LIFETIME_S": "7200",
    }  # fmt: skip
    one = Cloud(directory, hypervisor, hosts, unlimited | dict(environ or {}))
    try:
        one.first_start_s = await one.start()
        yield one
    finally:
        await one.stop()
        down = [sys.executable, "-m", "instar.cli", "down", "--dir", str(directory)]
        await asyncio.to_thread(subprocess.run, down, check=False, capture_output=True, timeout=DOWN_DEADLINE_S)
        shutil.rmtree(directory, ignore_errors=True)
