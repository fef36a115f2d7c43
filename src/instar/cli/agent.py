"""`instar agent`: the process on a host. It serves the host's queue on the bus of a cloud on the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import structlog
import uvloop

from instar.agent.agent import Agent
from instar.agent.fence import Fence
from instar.bus.socket import SocketBus
from instar.cli.control_plane import machine_boot_id
from instar.cli.hosts.local_host import LocalHost
from instar.cli.libvirt_host import libvirt_host, open_streams
from instar.cli.log_format import FORMATS, LEVELS, configure_log
from instar.cli.state_dir import StateDir
from instar.config import Settings, load
from instar.errors import StartupError
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI, PrivateDaemon, system_libvirtd_usable

log = structlog.get_logger()

LOCK_MAX_S = 20.0  # an agent before this one may take so long to end
LOCK_POLL_S = 0.1
STOP_MAX_S = 10.0
NAMESPACE = uuid.UUID("5a2cde24-93b5-4d8e-9b57-0f1e3a4c7d61")  # of the ids that hosts have for their libvirtd


@click.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path), required=True, help="The directory of the cloud.")
@click.option("--host", "name", required=True, help="The name of this host; its state is kept in DIR/hosts/NAME.")
@click.option("--address", help="IPv4 address of this host, by which other hosts reach it; without it there are none.")
@click.option(
    "--libvirtd", type=click.Choice(["auto", "private"]), default="auto", show_default=True,
    help="auto: the system's where there is one.",
)  # fmt: skip
@click.option("--shares", type=click.IntRange(1), default=1, show_default=True, help="Hosts that share this machine.")
@click.option("--end-with-input", is_flag=True, help="End when standard input does: with who started this.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file: see `instar config show`.")
@click.option("--log-format", type=click.Choice(FORMATS), default="console", show_default=True)
@click.option("--log-level", type=click.Choice(list(LEVELS)), help="[default: info]")
def agent(
    directory: Path,
    name: str,
    address: str | None,
    libvirtd: str,
    shares: int,
    end_with_input: bool,
    config: Path | None,
    log_format: str,
    log_level: str | None,
) -> None:
    """Serve one host of a cloud on this machine, until Ctrl-C or SIGTERM. Guests go on when it stops.

    `instar up --hosts 2` starts one for each host by itself, in namespaces of the host's own. It connects to the cloud's
    bus (DIR/bus.sock), waits while there is none, and takes up its libvirtd and guests where an earlier one left them.

    \b
    Example:
      instar agent --dir /srv/a --host host-1
    """
    settings = load(config)
    configure_log(log_format, log_level or settings.log_level)
    host = LocalHost(directory.absolute() / "hosts", name)
    if not host.directory.is_dir():
        raise StartupError(f"{directory} has no host {name}.")
    with _alone(host):
        process = _HostProcess(StateDir(directory), host, settings, address, libvirtd, shares)
        uvloop.run(process.serve(end_with_input=end_with_input))
        # A libvirt call that hangs must not hold us: its thread is not waited for.
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _alone(host: LocalHost) -> Iterator[None]:
    """Nobody else serves this host until the end. Raises StartupError."""
    deadline = time.monotonic() + LOCK_MAX_S
    with (host.directory / "agent.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StartupError(f"Another agent serves host {host.name}.") from None
                time.sleep(LOCK_POLL_S)
        yield


class _HostProcess(NamedTuple):
    """What the options say: one host and how it is reached."""

    state: StateDir
    host: LocalHost
    settings: Settings
    address: str | None
    libvirtd: str
    shares: int

    async def serve(self, *, end_with_input: bool) -> None:
        """Start, wait for a signal or the end of the input, stop."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if end_with_input:
            loop.add_reader(0, _drop_input, stop)
        async with AsyncExitStack() as stack:
            starting = asyncio.create_task(self._start(stack))
            waiting = asyncio.create_task(stop.wait())
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                log.info("agent.ready", host=self.host.name, address=self.address)
                await waiting
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_MAX_S):
                    await stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        host = self.host
        hypervisor = libvirt_host(
            host.directory,
            self.state.cloud_id,
            self.settings,
            name=host.name,
            uri=await self._libvirtd_uri(),
            address=self.address,
            machine_shares=self.shares,
            streams=await open_streams(
                stack, host.directory, self.settings, name=host.name, address=self.address or "127.0.0.1"
            ),
        )
        bus = SocketBus(self.state.bus_socket)
        await bus.open()
        stack.push_async_callback(bus.close)
        fence = Fence(host.directory / "fences")
        serving = Agent({host.name: hypervisor}, bus, fence, self.settings.host, boot_id=machine_boot_id)
        stack.push_async_callback(serving.close)
        await serving.open()

    async def _libvirtd_uri(self) -> str:
        if self.libvirtd == "auto" and await system_libvirtd_usable():
            return SYSTEM_URI
        # Hosts of one machine would have its id in common, and libvirt migrates no guest to where it already is.
        host_uuid = uuid.uuid5(NAMESPACE, f"{self.state.cloud_id} {self.host.name}")
        return await PrivateDaemon(self.host.directory, host_uuid=str(host_uuid)).ensure_running()


def _drop_input(stop: asyncio.Event) -> None:
    """Nobody writes to us; what can be read is the end."""
    try:
        if os.read(0, 4096):
            return
    except OSError:
        pass
    asyncio.get_running_loop().remove_reader(0)
    stop.set()
