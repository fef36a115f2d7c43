"""Where a host takes streams from other hosts, and by which certificate it is known."""

from __future__ import annotations

import msgspec


class StreamAddress(msgspec.Struct, frozen=True):
    """`certificate` is PEM, self-signed; who connects pins it, and who is granted something is known by it. No secret.
    A client that only connects (the API's process) has `port` 0."""

    host: str
    address: str
    port: int
    certificate: str
