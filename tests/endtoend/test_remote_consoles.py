"""The screen and the serial line of a real guest, as its owner reaches them: one guest for all of it."""

from __future__ import annotations

import os
import pty
import selectors
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from instar.config import ConsoleSettings
from instar.consoles.novnc import novnc_dir
from tests.endtoend.guest_access import Guest
from tests.endtoend.headless_browser import CHROMIUM, opened
from tests.endtoend.openstack_shell import OpenstackShell
from tests.endtoend.running_cloud import INSTAR, RunningCloud, wait_until

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]

ENOUGH_S = 300.0
RFB_VERSION = b"RFB 003.008\n"
NO_AUTHENTICATION = 1
FRAMEBUFFER_UPDATE = 0


class Rfb:
    """The bytes of a WebSocket as one stream."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._buffer = connection, b""

    def send(self, data: bytes) -> None:
        self._connection.send(data)

    def read(self, length: int) -> bytes:
        while len(self._buffer) < length:
            message = self._connection.recv(timeout=ENOUGH_S)
            assert isinstance(message, bytes)
            self._buffer += message
        data, self._buffer = self._buffer[:length], self._buffer[length:]
        return data


def test_the_consoles_of_a_guest(libvirt_cloud: RunningCloud, tmp_path: Path) -> None:
    demo = libvirt_cloud.shell("instar-demo", OS_COMPUTE_API_VERSION="2.96")
    made = demo.show(
        "server create --image tiny --flavor m1.nano --network private --config-drive true --wait",
        "--property", "console_shell=1", "looked-at",
    )  # fmt: skip
    check_screen(libvirt_cloud, demo)
    guest = Guest(libvirt_cloud, made["id"])
    guest.wait_for_boot(1)
    check_page(demo, tmp_path)
    check_serial_line(demo)
    check_terminal(libvirt_cloud)
    check_end_of_the_guest(guest, demo)
    demo.do("server delete --wait looked-at")


def check_screen(cloud: RunningCloud, demo: OpenstackShell) -> None:
    shown = demo.show("console url show --novnc looked-at")
    assert (shown["protocol"], shown["type"]) == ("vnc", "novnc")
    page = httpx.get(shown["url"])
    assert page.status_code in (200, 404), "404 where noVNC is not installed"
    path = parse_qs(urlsplit(shown["url"]).query)["path"][0]
    url = f"{cloud.url.replace('http:', 'ws:')}/{path}"
    with connect(url, subprotocols=["binary"], origin=cloud.url) as connection:  # type: ignore[arg-type,list-item]
        assert connection.subprotocol == "binary"
        width, height = rfb_handshake(Rfb(connection))
        assert width >= 320 and height >= 200
    with pytest.raises(InvalidStatus):
        connect(url)
    console = cloud.admin.call("GET", f"/os-console-auth-tokens/{path.rpartition('=')[2]}")
    assert console.status_code == 404, "it is used up"


def rfb_handshake(rfb: Rfb) -> tuple[int, int]:
    """As RFC 6143 has it, up to the first update of the framebuffer; width and height."""
    assert rfb.read(12) == RFB_VERSION
    rfb.send(RFB_VERSION)
    kinds = rfb.read(rfb.read(1)[0])
    assert NO_AUTHENTICATION in kinds
    rfb.send(bytes([NO_AUTHENTICATION]))
    assert rfb.read(4) == bytes(4)
    rfb.send(b"\x01")  # others may look, too
    width, height = struct.unpack(">HH", rfb.read(4))
    rfb.read(16)
    rfb.read(int.from_bytes(rfb.read(4), "big"))
    rfb.send(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height))
    while (kind := rfb.read(1)[0]) != FRAMEBUFFER_UPDATE:
        assert kind == 2, "nothing but a bell comes unasked"
    rfb.read(1)
    assert int.from_bytes(rfb.read(2), "big") >= 1
    return width, height


def check_serial_line(demo: OpenstackShell) -> None:
    shown = demo.show("console url show --serial looked-at")
    assert shown["url"].startswith("ws://") and "?token=" in shown["url"]
    with connect(shown["url"]) as connection:
        connection.send(b"\r")
        echoed(connection.send, lambda: _text(connection), "6*7")
        with connect(demo.show("console url show --serial looked-at")["url"]) as newer:
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    connection.recv(timeout=ENOUGH_S)
            assert closed.value.rcvd is not None and "another one" in closed.value.rcvd.reason
            echoed(newer.send, lambda: _text(newer), "7*8")


def check_page(demo: OpenstackShell, folder: Path) -> None:
    """noVNC's own page in a real browser shows the guest's screen, and the browser has nothing to complain about."""
    if CHROMIUM is None or novnc_dir(ConsoleSettings()) is None:
        return
    with opened(demo.show("console url show --novnc looked-at")["url"], folder / "profile") as page:
        wait_until(lambda: page.ask("document.documentElement.classList.contains('noVNC_connected')"), ENOUGH_S)
        assert page.ask("document.querySelector('canvas').width") >= 320
        # More than black and opaque: the text of the screen.
        colours = "new Set(document.querySelector('canvas').getContext('2d').getImageData(0, 0, 320, 200).data).size"
        wait_until(lambda: page.ask(colours) > 2, ENOUGH_S)
        # The page looks for a version file that Debian's package does not have, and goes on.
        assert [one for one in page.complaints if "package.json" not in one] == []


def _text(connection: ClientConnection) -> str:
    try:
        message = connection.recv(timeout=1)
    except TimeoutError:
        return ""
    return message.decode(errors="replace") if isinstance(message, bytes) else message


def echoed(send: Callable[[bytes], object], read: Callable[[], str], sum_: str) -> None:
    """The guest's shell computes it: what was typed does not hold the answer."""
    wanted = f"is:{eval(sum_)}:"
    seen, typed_at, deadline = "", 0.0, time.monotonic() + ENOUGH_S
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if time.monotonic() - typed_at > 5:
            typed_at = time.monotonic()
            send(f"echo is:$(({sum_})):\r".encode())
        seen += read()


def check_terminal(cloud: RunningCloud) -> None:
    """`instar server console` on a terminal of its own: keys go there as they are, Ctrl-] leaves."""
    terminal, of_program = pty.openpty()
    process = subprocess.Popen(
        [INSTAR, "server", "console", "looked-at"], stdin=of_program, stdout=of_program, stderr=of_program,
        env=cloud.environ("instar-demo"), start_new_session=True,
    )  # fmt: skip
    try:
        os.close(of_program)
        echoed(lambda data: os.write(terminal, data), lambda: _available(terminal), "8*9")
        os.write(terminal, b"\x1d")
        seen, deadline = "", time.monotonic() + ENOUGH_S
        while process.poll() is None:
            assert time.monotonic() < deadline, seen
            seen += _available(terminal)
        assert process.returncode == 0 and "left" in seen + _available(terminal)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def _available(terminal: int) -> str:
    with selectors.DefaultSelector() as selector:
        selector.register(terminal, selectors.EVENT_READ)
        if not selector.select(1):
            return ""
        try:
            return os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the program has ended
            return ""


def check_end_of_the_guest(guest: Guest, demo: OpenstackShell) -> None:
    unused = demo.show("console url show --novnc looked-at")["url"]
    with connect(demo.show("console url show --serial looked-at")["url"]) as connection:
        demo.do("server stop looked-at")
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                connection.recv(timeout=ENOUGH_S)
        assert closed.value.rcvd is not None and "guest ended" in closed.value.rcvd.reason
    guest.cloud.settled(guest.id, "SHUTOFF", within_s=30)
    assert "no running guest" in demo.said("console", "url", "show", "--novnc", "looked-at")
    token = parse_qs(urlsplit(unused).query)["path"][0].rpartition("=")[2]
    assert guest.cloud.admin.call("GET", f"/os-console-auth-tokens/{token}").status_code == 404
    assert token not in guest.cloud.log()
