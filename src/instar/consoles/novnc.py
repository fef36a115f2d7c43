"""noVNC's files as they are installed, served to browsers. Used by `service.py`.

Which files there are is found out once, when the program starts: a request can name one of them and nothing else, so no
path of a request is ever looked for on the disk.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

from instar.config import ConsoleSettings
from instar.errors import NotFound
from instar.http.answer import Answer
from instar.http.request import Request

SEGMENTS_MAX = 6
FILE_MAX_BYTES = 4 << 20
PLACES = (Path(sys.prefix, "share", "novnc"), Path("/usr/share/novnc"))  # install.sh's place, Debian's
TYPES: Mapping[str, bytes] = {
    ".html": b"text/html; charset=utf-8", ".css": b"text/css; charset=utf-8", ".js": b"text/javascript; charset=utf-8",
    ".json": b"application/json", ".png": b"image/png", ".svg": b"image/svg+xml", ".ico": b"image/x-icon",
    ".woff": b"font/woff", ".woff2": b"font/woff2", ".ttf": b"font/ttf", ".mp3": b"audio/mpeg", ".oga": b"audio/ogg",
}  # fmt: skip
# noVNC needs nothing from elsewhere. Its URL holds the token, so nobody is told where a reader comes from.
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        b"font-src 'self'; media-src 'self'; connect-src 'self'; worker-src 'self' blob:; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
FILE_CACHE = b"public, max-age=3600"
PAGE_CACHE = b"no-store"  # its URL holds a token


def novnc_dir(settings: ConsoleSettings) -> Path | None:
    """Where noVNC is installed; None where it is not. Blocking."""
    places = (Path(settings.novnc_dir),) if settings.novnc_dir else PLACES
    return next((place for place in places if (place / "vnc.html").is_file()), None)


class NovncPages:
    """`directory` None: noVNC is not installed, and every file is a 404 that says so. Blocking."""

    def __init__(self, directory: Path | None) -> None:
        self._installed = directory is not None
        self._files = _files(directory) if directory is not None else {}

    async def get(self, request: Request) -> Answer:
        name = "/".join(request.params[f"s{number}"] for number in range(len(request.params)))
        path = self._files.get(name)
        if path is None:
            if not self._installed:
                raise NotFound(
                    "noVNC is not installed on this machine: `make install` or the Debian package novnc brings it. "
                    "Serial consoles need nothing."
                )
            raise NotFound(f"noVNC has no file {name[:80]!r}.")
        is_page = path.suffix == ".html"
        try:
            content = await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise NotFound("This file of noVNC is not there any more.") from error
        return Answer(
            200, content, TYPES[path.suffix], (*HEADERS, (b"cache-control", PAGE_CACHE if is_page else FILE_CACHE))
        )


def _files(directory: Path) -> dict[str, Path]:
    """Every servable file by its path below `directory`; a link that leads out of it is none."""
    root = directory.resolve()
    found = {}
    for path in root.rglob("*"):
        real = path.resolve()
        parts = path.relative_to(root).parts
        if real.suffix not in TYPES or path.suffix != real.suffix or len(parts) > SEGMENTS_MAX:
            continue
        if real.is_file() and real.is_relative_to(root) and real.stat().st_size <= FILE_MAX_BYTES:
            found["/".join(parts)] = real
    return found
