"""What a driver needs of the streams between hosts, to move disks and guests: `streams.StreamServer` and `StreamClient`.

The program hands both in, in one bundle; a driver knows nothing of how they work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from instar.hypervisor.console_offer import SocketGrants
from instar.model.stream import StreamAddress


class Tunnel(Protocol):
    """A unix socket here that stands for one of a peer. `error`: why the last connection to it did not come about."""

    @property
    def error(self) -> Exception | None: ...

    async def close(self) -> None: ...


class StreamGrants(SocketGrants, Protocol):
    """What this host gives out."""

    def grant_file(self, to: StreamAddress, name: str, path: Path, *, valid_s: float) -> None: ...

    def revoke(self, prefix: str) -> None: ...


class StreamFetches(Protocol):
    """What this host gets from others."""

    async def fetch_file(
        self,
        peer: StreamAddress,
        name: str,
        target: Path,
        *,
        progress: Callable[[int, int], None] | None = None,
        deadline_s: float,
    ) -> None: ...

    async def discard_part(self, target: Path) -> None: ...

    async def tunnel(self, local_socket: Path, peer: StreamAddress, name: str) -> Tunnel: ...
