"""`instar server console`: the terminal on a server's serial line, through the public API as any user has it."""

from __future__ import annotations

import os
import queue
import select
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import click
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from instar.cli.client import CloudClient, CloudUnreachable

ESCAPE = b"\x1d"  # Ctrl-]
OPEN_TIMEOUT_S = 40.0
READ_BYTES = 4096
LOOK_EVERY_S = 0.5
MESSAGE_MAX_BYTES = 1 << 20


def attach(client: CloudClient, name: str) -> None:
    """Until Ctrl-], the end of the input, or the end of the guest. Raises CloudUnreachable that says what is wrong."""
    server_id = find_server(client, name)
    wanted = {"remote_console": {"protocol": "serial", "type": "serial"}}
    url = client.compute("POST", f"/servers/{server_id}/remote-consoles", wanted)["remote_console"]["url"]
    try:
        connection = connect(url, subprotocols=["binary"], open_timeout=OPEN_TIMEOUT_S, max_size=MESSAGE_MAX_BYTES)  # type: ignore[list-item]
    except InvalidStatus as error:
        said = (error.response.body or b"").decode(errors="replace").strip()
        raise CloudUnreachable(said or f"The cloud answered {error.response.status_code}.") from error
    except (OSError, TimeoutError, WebSocketException) as error:
        raise CloudUnreachable(f"The console cannot be reached: {error}.") from error
    click.echo(f"connected to {name}; Ctrl-] leaves", err=True)
    with connection, _raw_terminal():
        reason = _talk(connection)
    click.echo(f"\n{reason}", err=True)


def find_server(client: CloudClient, name: str) -> str:
    """The id of the one server of this name or id. Raises CloudUnreachable."""
    servers = client.compute("GET", "/servers")["servers"]
    found = [one["id"] for one in servers if one["id"] == name] or [one["id"] for one in servers if one["name"] == name]
    if not found:  # of another project, or beyond the first page
        return str(client.compute("GET", f"/servers/{_plain(name)}")["server"]["id"])
    if len(found) > 1:
        raise CloudUnreachable(f"{len(found)} servers have the name {name}: give an id.")
    return str(found[0])


def _plain(name: str) -> str:
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise CloudUnreachable(f"There is no server {name!r}.")
    return name


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys go to the guest one by one, unseen by this terminal; as it was when this ends."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _talk(connection: ClientConnection) -> str:
    """Both ways, until one side ends; returns why. What is typed is sent by a thread: a guest that reads nothing must not
    keep anybody from leaving."""
    typed: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_show, args=(connection, ended), daemon=True),
        threading.Thread(target=_send, args=(connection, typed), daemon=True),
    ]
    for thread in threads:
        thread.start()
    descriptor = sys.stdin.fileno()
    interactive = sys.stdin.isatty()
    try:
        while ended.empty():
            if not select.select([descriptor], [], [], LOOK_EVERY_S)[0]:
                continue
            data = os.read(descriptor, READ_BYTES)
            if not data and not interactive:
                return ended.get()  # a pipe: all is typed, its answer may still come
            before, escape, _ = data.partition(ESCAPE)
            if before:
                typed.put(before)
            if escape or not data:
                return "left"
        return ended.get()
    finally:
        typed.put(None)


def _show(connection: ClientConnection, ended: queue.SimpleQueue[str]) -> None:
    try:
        while True:
            data = connection.recv()
            sys.stdout.buffer.write(data if isinstance(data, bytes) else data.encode())
            sys.stdout.buffer.flush()
    except ConnectionClosed as closed:
        ended.put((closed.rcvd.reason if closed.rcvd else "") or "the console has ended")
    except OSError:
        ended.put("nobody reads the output")


def _send(connection: ClientConnection, typed: queue.SimpleQueue[bytes | None]) -> None:
    try:
        while (data := typed.get()) is not None:
            connection.send(data)
    except (ConnectionClosed, OSError):
        return  # the other thread says why
