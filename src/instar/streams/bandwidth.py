"""A limit on bytes a second, shared by all file streams of a server. Used from their threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.1  # what was not used is kept for so long


class Bandwidth:
    """Each taker gets its turn in the order of asking: a stream cannot starve another. 0 means no limit."""

    def __init__(self, max_bytes_s: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes_s = max_bytes_s
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, size_bytes: int) -> float:
        """Seconds to wait before sending so many bytes; they are counted as sent."""
        if not self.max_bytes_s:
            return 0.0
        with self._lock:
            now = self._clock()
            starts = max(self._free_at, now - BURST_S)
            self._free_at = starts + size_bytes / self.max_bytes_s
            return max(0.0, self._free_at - now)
