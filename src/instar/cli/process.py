"""How every process of a cloud lives: it starts, says that it is ready, works until it is told to stop, and stops.

Used by `instar up`, `api`, `conductor`, `storage` and `agent`. Who started the process hears of it on standard output (a
line `ready: …`) and, where that is systemd or speaks as it does, at the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable
from typing import Protocol

import click

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GARBAGE_AFTER = (20_000, 20, 20)  # new objects that make the collector look; looks of each generation for one of the next


class Program(Protocol):
    """What a process runs."""

    async def start(self) -> str:
        """Everything is up: returns what the ready line says. May be cancelled. Raises StartupError."""
        ...

    async def stop(self) -> None:
        """Everything is down again; also after a start that failed or was cancelled."""
        ...


async def run_program(program: Program, *, announce: Callable[[str], None], end_with_input: bool = False) -> None:
    """Start it, `announce` it, wait for a signal (or for the end of standard input, if so wanted), stop it.

    A second signal ends the process at once, which loses nothing either."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if end_with_input:
        loop.add_reader(0, _drop_input, stop)

    def stopping(number: signal.Signals) -> None:
        click.echo("stopping", err=True)
        loop.remove_signal_handler(number)
        stop.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, stopping, number)
    starting = asyncio.create_task(program.start(), name="start")
    waiting = asyncio.create_task(stop.wait(), name="until told to stop")
    try:
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            said = await starting
            _spare_the_collector()
            announce(said)
            notify("READY=1")
            await waiting
    finally:
        notify("STOPPING=1")
        for task in (starting, waiting):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(starting, waiting, return_exceptions=True)
        await program.stop()


def say_ready(text: str) -> None:
    """The line that whoever started this process waits for."""
    click.echo(f"ready: {text}")


def notify(state: str) -> None:
    """Tell the service manager, where there is one: the protocol of sd_notify(3), a datagram to its socket."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(state.encode("ascii"), address)


def _spare_the_collector() -> None:
    """Modules, routes and decoders stay until the end: garbage is looked for among what came after them, and more rarely
    than usual. Almost everything that a request or an operation leaves behind goes without being looked for."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_AFTER)


def _drop_input(stop: asyncio.Event) -> None:
    """Nobody writes to us; what can be read is the end: of who started this process, however it ended."""
    try:
        if os.read(0, 4096):
            return
    except OSError:
        pass
    asyncio.get_running_loop().remove_reader(0)
    stop.set()
