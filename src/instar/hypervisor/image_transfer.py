"""Images between a host and an image service that it reaches by HTTP alone: fetched in parts that go on where they broke
off, and sent whole. Blocking: for threads. Called by both hypervisors.

The other side may be restarted meanwhile, or have no database for a moment: then it is asked again. Redirects are not
followed: the URL is what the image service said.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from instar.errors import HypervisorError, ImageGone

CHUNK_BYTES = 1 << 20
AGAIN_MAX = 6  # times without a byte, or one after another
PAUSE_FIRST_S, PAUSE_MAX_S = 0.2, 3.0
_TROUBLE = (OSError, http.client.HTTPException)
_LATER = (500, 502, 503, 504)


def fetched(
    location: SplitResult, image_id: str, size_bytes: int, *, idle_timeout_s: float, deadline: float,
    token: str | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """The image's bytes, `size_bytes` of them unless it is another image. `deadline` is monotonic seconds.

    Raises ImageGone, HypervisorError, and the last error of the network when it does not get on."""
    received, failed = 0, 0
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    while received < size_bytes or size_bytes == 0:
        try:
            with _answer("GET", location, image_id, idle_timeout_s, headers | _from(received)) as response:
                if received and response.status != 206:
                    raise HypervisorError(reason=f"the image service cannot go on with image {image_id}")
                while chunk := response.read(CHUNK_BYTES):
                    received, failed = received + len(chunk), 0
                    yield chunk
            if received < size_bytes:
                raise http.client.IncompleteRead(b"", size_bytes - received)
            return
        except _TROUBLE:
            failed += 1
            if failed > AGAIN_MAX or time.monotonic() > deadline:
                raise
            _pause(failed)


def send(
    path: Path, url: str, image_id: str, *, idle_timeout_s: float, stop: threading.Event, tell: Callable[[int], object]
) -> None:
    """The file is at the URL. `tell` hears how many percent went; `stop` ends it with HypervisorError.

    Raises ImageGone (it is not wanted any more), HypervisorError."""
    location, failed = urlsplit(url), 0
    while True:
        try:
            with path.open("rb") as file:
                size_bytes = path.stat().st_size
                headers = {"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"}
                body = _sent(file.read, size_bytes, stop, tell)
                with _answer("PUT", location, image_id, idle_timeout_s, headers, body):
                    return
        except _TROUBLE as error:
            failed += 1
            if failed > AGAIN_MAX or stop.is_set():
                raise HypervisorError(reason=f"image {image_id} could not be sent") from error
            _pause(failed)


def _sent(
    read: Callable[[int], bytes], size_bytes: int, stop: threading.Event, tell: Callable[[int], object]
) -> Iterator[bytes]:
    sent = 0
    while chunk := read(CHUNK_BYTES):
        if stop.is_set():
            raise HypervisorError(reason="the sending of the image was ended")
        yield chunk
        sent += len(chunk)
        tell(sent * 100 // size_bytes)


@contextlib.contextmanager
def _answer(
    method: str, location: SplitResult, image_id: str, idle_timeout_s: float, headers: dict[str, str],
    body: Iterator[bytes] | None = None,
) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
    kind = http.client.HTTPSConnection if location.scheme == "https" else http.client.HTTPConnection
    connection = kind(location.hostname or "", location.port, timeout=idle_timeout_s)
    try:
        target = location.path + (f"?{location.query}" if location.query else "")
        connection.request(method, target, headers=headers, body=body)
        response = connection.getresponse()
        if response.status in (404, 410) or (method == "PUT" and response.status == 409):
            raise ImageGone(image_id=image_id)
        if response.status in _LATER:
            raise http.client.HTTPException(f"status {response.status}")
        if response.status not in (200, 204, 206):
            raise HypervisorError(reason=f"image {image_id}: the image service answered {response.status}")
        yield response
    finally:
        connection.close()


def _from(received: int) -> dict[str, str]:
    return {"Range": f"bytes={received}-"} if received else {}


def _pause(failed: int) -> None:
    time.sleep(min(PAUSE_FIRST_S * 2 ** (failed - 1), PAUSE_MAX_S))
