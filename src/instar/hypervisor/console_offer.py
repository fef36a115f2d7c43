"""How a driver offers a console: a unix socket of its host, granted as a stream to one process. Used by both drivers."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.stream import StreamAddress

OFFER_VALID_S = 30.0


class SocketGrants(Protocol):
    """The host's side of streams: `streams.StreamServer`."""

    @property
    def address(self) -> StreamAddress: ...

    def grant_socket(self, to: StreamAddress, name: str, socket_path: Path, *, valid_s: float) -> None: ...


def console_name(instance_id: str, kind: ConsoleKind) -> str:
    """The name of the stream; who may have it is told by the certificate that it is granted to."""
    return f"console/{instance_id}/{kind.value}"


def grant_console(
    streams: SocketGrants, instance_id: str, kind: ConsoleKind, path: Path, to: StreamAddress
) -> ConsoleOffer:
    """`to` may connect to the socket at `path` from now on, for OFFER_VALID_S."""
    name = console_name(instance_id, kind)
    streams.grant_socket(to, name, path, valid_s=OFFER_VALID_S)
    return ConsoleOffer(streams.address, name)
