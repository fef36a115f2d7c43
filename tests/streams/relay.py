"""A TCP relay between a client and a server that can be cut, and counts the bytes that come back from the server."""

from __future__ import annotations

import contextlib
import socket
import threading

import msgspec

from instar.model.stream import StreamAddress


class Relay:
    """`cut_after` bytes from the server, every connection is dropped, `cuts` times."""

    def __init__(self, to: StreamAddress, *, cut_after: int = 0, cuts: int = 0) -> None:
        self._to, self._cut_after, self._cuts = to, cut_after, cuts
        self.bytes_back = 0
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = msgspec.structs.replace(to, port=self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections += 1
                far = socket.create_connection((self._to.address, self._to.port))
                for a, b, counted in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._copy, args=(a, b, counted), daemon=True).start()

    def _copy(self, a: socket.socket, b: socket.socket, counted: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while piece := a.recv(65536):
                b.sendall(piece)
                if not counted:
                    continue
                passed += len(piece)
                self.bytes_back += len(piece)
                if self._cuts and passed > self._cut_after:
                    self._cuts -= 1
                    break
        for each in (a, b):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
