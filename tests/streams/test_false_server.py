"""A peer with the right certificate that sends what it must not: nothing of it reaches the target."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instar.errors import StreamBroken, StreamRefused
from instar.model.stream import StreamAddress
from instar.streams import wire
from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.streams.sparse import CELL_BYTES, FileDigest, FileFacts, checksum_of

FACTS = FileFacts(size=3 * CELL_BYTES, mtime_ns=1, inode=2, device=3)
CONTENT = bytearray(b"x" * CELL_BYTES)
GOOD = wire.Cell(0, [(0, CELL_BYTES)], checksum_of(CONTENT))
Sender = Callable[[ssl.SSLSocket], None]


@contextlib.contextmanager
def serving(directory: Path, client: StreamClient, sender: Sender) -> Iterator[StreamAddress]:
    """Accepts every request for a file and lets `sender` say the rest."""
    identity = StreamIdentity.open(directory)
    context = identity.server_context([client.address.certificate])
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError, wire.WireError), context.wrap_socket(plain, server_side=True) as secure:
                wire.send(secure, wire.Hello(wire.PROTOCOL))
                wire.receive(secure)
                wire.send(secure, wire.Accepted(FACTS, 0))
                sender(secure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield StreamAddress("false", "127.0.0.1", listener.getsockname()[1], identity.certificate)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def damaged(secure: ssl.SSLSocket) -> None:
    wire.send(secure, GOOD, CONTENT[:-1] + b"y")


def outside(secure: ssl.SSLSocket) -> None:
    wire.send(secure, wire.Cell(3, GOOD.extents, GOOD.checksum), CONTENT)


def overlapping(secure: ssl.SSLSocket) -> None:
    wire.send(secure, wire.Cell(0, [(0, CELL_BYTES), (5, 10)], GOOD.checksum), CONTENT)


def twice(secure: ssl.SSLSocket) -> None:
    wire.send(secure, GOOD, CONTENT)
    wire.send(secure, GOOD, CONTENT)


def endless(secure: ssl.SSLSocket) -> None:
    secure.sendall(b"\xff" * 4)


def nonsense(secure: ssl.SSLSocket) -> None:
    secure.sendall(b"\0\0\0\4what")


def wrong_whole(secure: ssl.SSLSocket) -> None:
    wire.send(secure, GOOD, CONTENT)
    wire.send(secure, wire.End(FileDigest().of_whole(FACTS.size)))


@pytest.mark.parametrize(
    ("sender", "reason"),
    [
        (damaged, "damaged"),
        (outside, "out of place"),
        (overlapping, "out of place"),
        (twice, "out of place"),
        (endless, "too long"),
        (nonsense, "no sense"),
        (wrong_whole, "digest is wrong"),
    ],
)
async def test_what_is_not_right_is_never_the_target(
    tmp_path: Path, client: StreamClient, sender: Sender, reason: str
) -> None:
    target = tmp_path / "target"
    with serving(tmp_path / "false", client, sender) as address, pytest.raises(StreamBroken, match=reason) as caught:
        await client.fetch_file(address, "disk", target, deadline_s=1.5)
    assert not isinstance(caught.value, StreamRefused)
    assert not target.exists()


async def test_damaged_piece_is_fetched_again(tmp_path: Path, client: StreamClient) -> None:
    digest = FileDigest()
    digest.add(0, GOOD.checksum)
    calls: list[Sender] = [damaged]

    def once_damaged(secure: ssl.SSLSocket) -> None:
        if calls:
            calls.pop()(secure)
            return
        wire.send(secure, GOOD, CONTENT)
        wire.send(secure, wire.End(digest.of_whole(FACTS.size)))

    target = tmp_path / "target"
    with serving(tmp_path / "false", client, once_damaged) as address:
        await client.fetch_file(address, "disk", target, deadline_s=20)
    assert target.read_bytes() == CONTENT + bytes(2 * CELL_BYTES)
