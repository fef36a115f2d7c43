"""What may be had, by whom, until when: names to paths, for one certificate each. Nothing else is ever opened."""

from __future__ import annotations

import enum
import threading
import time
from pathlib import Path
from typing import NamedTuple

from instar.errors import StreamRefused
from instar.model.stream import StreamAddress
from instar.streams.identity import fingerprint, normalized
from instar.streams.wire import NAME_MAX

GRANTS_MAX = 10_000


class Kind(enum.Enum):
    FILE = "file"
    SOCKET = "socket"


class Grant(NamedTuple):
    kind: Kind
    name: str
    path: Path
    peer: bytes  # fingerprint of its certificate
    certificate: str
    ends_at: float  # monotonic


class Grants:
    """Used by the event loop and by the streams' threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._grants: dict[tuple[str, bytes], Grant] = {}

    def add(self, kind: Kind, to: StreamAddress, name: str, path: Path, *, valid_s: float) -> None:
        """The same name for the same peer replaces what it had. Raises StreamRefused: the name is too long, the
        certificate is none, or there are too many grants."""
        if not 1 <= len(name) <= NAME_MAX:
            raise StreamRefused(what=name[:NAME_MAX], host=to.host, reason="its name is empty or too long")
        try:
            peer, certificate = fingerprint(to.certificate), normalized(to.certificate)
        except ValueError as error:
            raise StreamRefused(what=name, host=to.host, reason="there is no valid certificate of the peer") from error
        with self._lock:
            self._drop_ended()
            if len(self._grants) >= GRANTS_MAX and (name, peer) not in self._grants:
                raise StreamRefused(what=name, host=to.host, reason="too many streams are granted")
            self._grants[name, peer] = Grant(kind, name, path, peer, certificate, time.monotonic() + valid_s)

    def find(self, kind: Kind, name: str, peer: bytes) -> Grant | None:
        with self._lock:
            grant = self._grants.get((name, peer))
        if grant is None or grant.kind is not kind or grant.ends_at <= time.monotonic():
            return None
        return grant

    def revoke(self, prefix: str) -> None:
        with self._lock:
            for key in [key for key in self._grants if is_under(key[0], prefix)]:
                del self._grants[key]

    def certificates(self) -> frozenset[str]:
        """Of all peers to whom something is granted now."""
        with self._lock:
            self._drop_ended()
            return frozenset(grant.certificate for grant in self._grants.values())

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for key in [key for key, grant in self._grants.items() if grant.ends_at <= now]:
            del self._grants[key]


def is_under(name: str, prefix: str) -> bool:
    """`disk/1` is under `disk`, `disk/` and `disk/1`, not under `disk/11` or `di`; everything is under the empty prefix."""
    whole = prefix.rstrip("/")
    return not whole or name == whole or name.startswith(whole + "/")
