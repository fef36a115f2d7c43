"""The receiving side of a file: fetches until it is whole, over as many connections as that takes. The client calls it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

from instar.errors import DiskFull, StreamBroken
from instar.model.stream import StreamAddress
from instar.streams.cut import Cut
from instar.streams.dial import ask, dial, refusal
from instar.streams.identity import StreamIdentity, fingerprint
from instar.streams.part import Part, is_full, mount_point
from instar.streams.sparse import CELL_BYTES, FileFacts, cell_length, checksum_of
from instar.streams.wire import (
    HANDSHAKE_MAX_S,
    IDLE_MAX_S,
    Alive,
    Cell,
    End,
    OpenFile,
    Refused,
    WireError,
    receive,
    receive_into,
)

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0
WHOLE_ATTEMPTS_MAX = 2  # a digest of the whole that is wrong a second time is no accident


class FileFetch:
    """One fetch. `run` blocks, in a thread of its own; `report` is told (bytes of the file that are done, its size)."""

    def __init__(
        self,
        identity: StreamIdentity,
        peer: StreamAddress,
        name: str,
        target: Path,
        *,
        host: str,
        report: Callable[[int, int], None],
        deadline_s: float,
        cut: Cut,
    ) -> None:
        self._identity, self._peer, self._name, self._target = identity, peer, name, target
        self._host, self._report, self._cut = host, report, cut
        self._deadline_s, self._ends_at = deadline_s, time.monotonic() + deadline_s
        self._began = False  # whether the source was seen in this fetch: from then on it must not change
        self._wrong_wholes = 0
        self._last_reason = "there is more to come"  # why it has not come yet

    def run(self) -> None:
        """Raises StreamRefused, StreamBroken, DiskFull, StreamCut."""
        part: Part | None = None
        try:
            part = Part(self._target, self._name, self._peer_fingerprint())
            while not part.take():
                self._pause(1.0, "another fetch of it is running")
            part.resume(self._cut)
            self._fetch(part)
            part.finish()
        except OSError as error:
            if is_full(error):
                if part is not None:
                    part.discard()  # the room is needed more than the head start
                raise DiskFull(filesystem=str(mount_point(self._target.parent)), host=self._host) from error
            raise self._broken(f"it cannot be written here ({error.strerror})") from error
        finally:
            if part is not None:
                part.close()

    def _peer_fingerprint(self) -> str:
        try:
            return fingerprint(self._peer.certificate).hex()
        except ValueError:
            return ""  # refused when it is dialled

    def _fetch(self, part: Part) -> None:
        wait_s = RETRY_FIRST_S
        while True:
            before = part.cells
            try:
                if self._fetch_once(part):
                    return
                reason = "its digest is wrong"
            except WireError as error:
                self._cut.check()
                reason = str(error)
            if part.cells > before:
                wait_s = RETRY_FIRST_S
            self._pause(wait_s, reason)
            wait_s = min(wait_s * 2, RETRY_MAX_S)

    def _fetch_once(self, part: Part) -> bool:
        """Over one connection. False: all has come, but it is not the whole; what is there was removed."""
        wait_s = min(HANDSHAKE_MAX_S, self._left_s())
        with dial(self._identity, self._peer, self._name, self._cut, wait_s=wait_s) as secure:
            secure.settimeout(min(IDLE_MAX_S, self._left_s()))
            prefix = part.digest.so_far() if part.cells else b""
            accepted = ask(secure, self._peer, OpenFile(self._name, part.cells, prefix, part.facts))
            facts = accepted.facts
            if facts is None or facts.size < 0 or accepted.start not in (0, part.cells):
                raise WireError("the answer makes no sense")
            if self._began and facts != part.facts:
                raise self._broken("it changed while it was sent")
            self._began = True
            part.begin(facts, accepted.start)
            self._report(min(part.cells * CELL_BYTES, facts.size), facts.size)
            return self._receive_cells(secure, part, facts)

    def _receive_cells(self, secure: ssl.SSLSocket, part: Part, facts: FileFacts) -> bool:
        while True:
            secure.settimeout(min(IDLE_MAX_S, self._left_s()))
            message = receive(secure)
            self._cut.check()
            if isinstance(message, Cell):
                part.write(message.index, message.extents, self._content(secure, message, part, facts), message.checksum)
                self._report(min(part.cells * CELL_BYTES, facts.size), facts.size)
            elif isinstance(message, End):
                if message.digest == part.digest.of_whole(facts.size):
                    self._report(facts.size, facts.size)
                    return True
                part.restart()
                self._began = False
                self._wrong_wholes += 1
                if self._wrong_wholes >= WHOLE_ATTEMPTS_MAX:
                    raise self._broken("its digest is wrong")
                return False
            elif isinstance(message, Refused):
                raise refusal(message, self._peer, self._name)
            elif not isinstance(message, Alive):
                raise WireError("a message makes no sense here")

    def _content(self, secure: ssl.SSLSocket, cell: Cell, part: Part, facts: FileFacts) -> bytearray:
        """The bytes of a cell, as its checksum says. Raises WireError."""
        length = cell_length(cell.index, facts.size)
        if cell.index < part.cells or length <= 0:
            raise WireError("a piece is out of place")
        content, free_from = bytearray(length), 0
        with memoryview(content) as view:
            for offset, extent_length in cell.extents:
                if offset < free_from or extent_length < 1 or offset + extent_length > length:
                    raise WireError("a piece is out of place")
                free_from = offset + extent_length
                receive_into(secure, view[offset:free_from])
        if checksum_of(content) != cell.checksum:
            raise WireError("a piece arrived damaged")
        return content

    def _left_s(self) -> float:
        """Until the deadline. Raises StreamBroken when that is over."""
        left_s = self._ends_at - time.monotonic()
        if left_s <= 0:
            raise self._late()
        return left_s

    def _pause(self, wait_s: float, reason: str) -> None:
        self._last_reason = reason
        if self._left_s() <= wait_s:
            raise self._late()
        self._cut.sleep(wait_s)

    def _late(self) -> StreamBroken:
        return self._broken(f"not within {self._deadline_s:g} seconds, {self._last_reason}")

    def _broken(self, reason: str) -> StreamBroken:
        return StreamBroken(what=self._name, host=self._peer.host, reason=reason)


