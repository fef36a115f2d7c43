"""Where a host takes streams from other hosts, and by which certificate it is known."""

from __future__ import annotations

import msgspec


class StreamAddress(msgspec.Struct, frozen=True):
    """`certificate` is PEM; who connects pins it. It is no secret."""

    host: str
    address: str
    port: int
    certificate: str
