"""Joins a plain socket and a TLS connection, both ways, until both directions have ended or one side is gone.

Used by a thread of its own at each end: by the server for a granted unix socket, by the client for a tunnel and a console.
One thread does both directions, because a TLS connection of Python must not be read and written by two threads at once.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time

from instar.streams.cut import Cut

BUFFER_MAX_BYTES = 256 * 1024  # in each direction; then the sender has to wait
PIECE_BYTES = 64 * 1024
LEAVE_MAX_S = 5.0
LOOK_EVERY_MS = 5_000  # shutting the sockets wakes us at once; this is for what nobody thought of
WAITING = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError)


class Pump:
    """`run` once. Neither socket is closed."""

    def __init__(self, plain: socket.socket, secure: ssl.SSLSocket, cut: Cut) -> None:
        self._plain, self._secure, self._cut = plain, secure, cut
        self._to_secure = bytearray()  # framed
        self._to_plain = bytearray()
        self._arrived = bytearray()  # a frame from the peer that is not whole yet
        self._plain_ended = False  # it sends nothing more
        self._plain_gone = False  # nor does it read
        self._plain_told = False  # that the peer sends nothing more
        self._peer_ended = False
        self._peer_gone = False

    def run(self) -> None:
        """Raises OSError when a side is lost in the middle (the peer's end without its word is such a loss), StreamCut."""
        self._plain.setblocking(False)
        self._secure.setblocking(False)
        while True:
            # Before waiting: TLS may hold bytes already that no poll shows.
            self._read_secure()
            self._write_plain()
            self._read_plain()
            self._write_secure()
            if self._peer_gone and not self._to_plain:
                return
            if self._all_sent() and (self._plain_gone or self._plain_told):
                break
            self._wait()
            self._cut.check()
        if not self._peer_ended:
            self._take_leave()

    def _all_sent(self) -> bool:
        return self._plain_ended and not self._to_secure

    def _wait(self) -> None:
        poll = select.poll()
        plain_wants = (select.POLLIN if self._may_read_plain() else 0) | (select.POLLOUT if self._to_plain else 0)
        secure_wants = (select.POLLIN if self._may_read_secure() else 0) | (select.POLLOUT if self._to_secure else 0)
        # A poll tells that the other end is gone also when nothing is wanted of it. But one that is gone with bytes left in
        # it, for which there is no room at this moment, would be told of again and again.
        if plain_wants or (self._plain_ended and not self._plain_gone):
            poll.register(self._plain, plain_wants)
        watch_peer = self._peer_ended and not self._peer_gone and not self._all_sent()
        if secure_wants or watch_peer:
            poll.register(self._secure, secure_wants | (select.POLLRDHUP if watch_peer else 0))
        for descriptor, events in poll.poll(LOOK_EVERY_MS):
            if descriptor == self._plain.fileno() and events & (select.POLLHUP | select.POLLERR) and self._plain_ended:
                self._lose_plain()
            elif descriptor == self._secure.fileno() and events & (select.POLLRDHUP | select.POLLHUP) and watch_peer:
                self._peer_gone = True

    def _may_read_plain(self) -> bool:
        return not self._plain_ended and len(self._to_secure) < BUFFER_MAX_BYTES

    def _may_read_secure(self) -> bool:
        return not self._peer_ended and len(self._to_plain) < BUFFER_MAX_BYTES

    def _lose_plain(self) -> None:
        self._plain_gone = True
        self._to_plain.clear()

    def _read_plain(self) -> None:
        with contextlib.suppress(*WAITING):
            while self._may_read_plain():
                try:
                    piece = self._plain.recv(PIECE_BYTES)
                except ConnectionResetError:  # it left with bytes unread; what it had sent before was read
                    piece = b""
                    self._lose_plain()
                self._to_secure += len(piece).to_bytes(4, "big") + piece
                self._plain_ended = not piece

    def _write_secure(self) -> None:
        with contextlib.suppress(*WAITING):
            while self._to_secure:
                # The first bytes of a buffer that only grows: OpenSSL wants to be given the same again.
                with memoryview(self._to_secure) as view, view[:PIECE_BYTES] as piece:
                    sent = self._secure.send(piece)
                del self._to_secure[:sent]

    def _read_secure(self) -> None:
        with contextlib.suppress(*WAITING):
            while self._may_read_secure():
                piece = self._secure.recv(PIECE_BYTES)
                if not piece:
                    raise ConnectionResetError("the peer ended without a word")
                self._arrived += piece
                self._take_frames()

    def _take_frames(self) -> None:
        while len(self._arrived) >= 4 and not self._peer_ended:
            length = int.from_bytes(self._arrived[:4], "big")
            if length > PIECE_BYTES:
                raise ConnectionAbortedError("a frame is too long")
            if len(self._arrived) < 4 + length:
                return
            if not self._plain_gone:
                self._to_plain += self._arrived[4 : 4 + length]
            del self._arrived[: 4 + length]
            self._peer_ended = length == 0

    def _write_plain(self) -> None:
        try:
            while self._to_plain:
                with memoryview(self._to_plain) as view:
                    sent = self._plain.send(view)
                del self._to_plain[:sent]
        except (BrokenPipeError, ConnectionResetError):
            self._lose_plain()
        except WAITING:
            return
        if self._peer_ended and not self._plain_told:
            self._plain_told = True
            with contextlib.suppress(OSError):  # it is gone itself
                self._plain.shutdown(socket.SHUT_WR)

    def _take_leave(self) -> None:
        """Nobody reads here any more. Closing with bytes unread would reset the connection, and what was sent last could be
        lost: so tell the peer, and read to its end."""
        socket.socket.shutdown(self._secure, socket.SHUT_WR)
        self._secure.settimeout(LEAVE_MAX_S)
        ends_at = time.monotonic() + LEAVE_MAX_S
        with contextlib.suppress(OSError):
            while time.monotonic() < ends_at and self._secure.recv(PIECE_BYTES):
                pass
