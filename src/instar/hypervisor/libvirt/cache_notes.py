"""What a host remembers of its cached images beside the files: when each was used, and whether its content was right.

Used by `image_cache.py` and `cache_sweep.py`. Kept in STATE_DIR/image-cache.json, written now and then: what is lost with a
crash only makes images younger (nothing is evicted soon after a start) or verified once more.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec


class CacheNote(msgspec.Struct, frozen=True):
    """`used_at` in seconds since the epoch. `facts` (size, mtime in ns) are those of the file that was `right` or not."""

    used_at: float
    facts: tuple[int, int] | None = None
    right: bool = True


_decode = msgspec.json.Decoder(dict[str, CacheNote]).decode


class CacheNotes:
    """Notes by SHA-256. `clock` gives seconds since the epoch."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path, self._clock = path, clock
        self._notes: dict[str, CacheNote] = {}

    def used(self, sha256: str) -> None:
        """It is used at this moment."""
        note = self._notes.get(sha256)
        now = self._clock()
        self._notes[sha256] = CacheNote(now) if note is None else msgspec.structs.replace(note, used_at=now)

    def used_at(self, sha256: str) -> float:
        return self._notes[sha256].used_at

    def checked(self, sha256: str, facts: tuple[int, int], *, right: bool) -> None:
        """A file with these facts was read to its end, and is the image or is not."""
        self._notes[sha256] = msgspec.structs.replace(self._notes[sha256], facts=facts, right=right)

    def was_checked(self, sha256: str, facts: tuple[int, int]) -> bool:
        return self._notes[sha256].facts == facts

    def is_damaged(self, sha256: str) -> bool:
        note = self._notes.get(sha256)
        return note is not None and not note.right

    def damaged(self) -> tuple[str, ...]:
        return tuple(sorted(sha256 for sha256, note in self._notes.items() if not note.right))

    def forget(self, sha256: str) -> None:
        self._notes.pop(sha256, None)

    def match(self, cached: Iterable[str]) -> None:
        """These are in the cache now. One that nobody told of counts as used at this moment."""
        now = self._clock()
        old = self._notes
        # A clock that was set back must not make images young for ever.
        self._notes = {
            sha256: msgspec.structs.replace(old[sha256], used_at=min(now, old[sha256].used_at))
            if sha256 in old
            else CacheNote(now)
            for sha256 in cached
        }

    # --- blocking -----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            self._notes = _decode(self._path.read_bytes())

    def encoded(self) -> bytes:
        """To be handed to `save`, in a thread. Not blocking."""
        return msgspec.json.encode(self._notes)

    def save(self, encoded: bytes) -> None:
        part = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        try:
            part.write_bytes(encoded)
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)
