"""A console of a guest: what kinds there are, and where a host offers one."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from instar.model.stream import StreamAddress


class ConsoleKind(StrEnum):
    """The way to look at a guest: its screen, or its serial line."""

    VNC = "vnc"
    SERIAL = "serial"


class ConsoleOffer(msgspec.Struct, frozen=True):
    """The console can be reached at this host, by whoever it was offered to, as the stream of this name."""

    address: StreamAddress
    name: str
