"""The sending side of a file. The server calls it in the stream's thread."""

from __future__ import annotations

import os
import ssl
import stat
import time
from pathlib import Path

from instar.streams.bandwidth import Bandwidth
from instar.streams.cut import Cut
from instar.streams.sparse import FileCell, FileDigest, FileFacts, FileShrank, read_cells
from instar.streams.wire import ALIVE_EVERY_S, Accepted, Alive, Cell, End, OpenFile, Refused, send


class FileSender:
    """One file to one client, once."""

    def __init__(self, secure: ssl.SSLSocket, bandwidth: Bandwidth, cut: Cut) -> None:
        self._secure, self._bandwidth, self._cut = secure, bandwidth, cut
        self._told_at = time.monotonic()
        self.sent_bytes = 0

    def send(self, path: Path, asked: OpenFile) -> None:
        """Raises WireError, StreamCut. A source that cannot be read, or that changes, is told to the client."""
        try:
            # O_NONBLOCK: a pipe in the file's place must not hold the thread.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            send(self._secure, Refused("unavailable"))
            return
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                send(self._secure, Refused("unavailable"))
                return
            self._send_open(descriptor, asked)
        except FileShrank:
            send(self._secure, Refused("changed"))
        finally:
            os.close(descriptor)

    def _send_open(self, descriptor: int, asked: OpenFile) -> None:
        facts = FileFacts.of(descriptor)
        digest, start = FileDigest(), 0
        if asked.start and asked.known == facts:
            # What the client has is read here again: its digest is part of the whole's, and tells whether to go on there.
            for cell in read_cells(descriptor, facts.size, 0, asked.start):
                digest.add(cell.index, cell.checksum)
                self._cut.check()
                self._stay_alive()
            if digest.so_far() == asked.prefix:
                start = asked.start
            else:
                digest = FileDigest()
        send(self._secure, Accepted(facts, start))
        for cell in read_cells(descriptor, facts.size, start):
            self._send_cell(cell)
            digest.add(cell.index, cell.checksum)
            if FileFacts.of(descriptor) != facts:
                send(self._secure, Refused("changed"))
                return
        unchanged = FileFacts.of(descriptor) == facts
        send(self._secure, End(digest.of_whole(facts.size)) if unchanged else Refused("changed"))

    def _send_cell(self, cell: FileCell) -> None:
        size_bytes = sum(length for _, length in cell.extents)
        wait_s = self._bandwidth.take(size_bytes)
        while wait_s > 0:
            self._cut.sleep(min(wait_s, ALIVE_EVERY_S))
            wait_s -= ALIVE_EVERY_S
            self._stay_alive()
        self._cut.check()
        data = cell.content
        if size_bytes < len(data):
            with memoryview(data) as view:
                data = bytearray().join(view[offset : offset + length] for offset, length in cell.extents)
        send(self._secure, Cell(cell.index, cell.extents, cell.checksum), data)
        self.sent_bytes += size_bytes
        self._told_at = time.monotonic()

    def _stay_alive(self) -> None:
        if time.monotonic() - self._told_at >= ALIVE_EVERY_S:
            send(self._secure, Alive())
            self._told_at = time.monotonic()
