"""How hosts that do not see the image directory get at images: by URLs of the Image API that open one image for one method.

A URL is signed with a key that all processes of the cloud share by the database, and expires. It is good for whoever has
it, so it goes only to hosts, over the bus; it names an image and a method, for no host can be told from another by HTTP.
What it gives is an image that the host verifies by its SHA-256, and a place for one snapshot. Called by `local.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

from instar.errors import Forbidden

PATH = "/image/hosts/images/"  # + the image's id; on the port of the API
KEY_NAME = "image_urls"
GET, PUT = "GET", "PUT"
EXPIRES_MAX_LENGTH = 12


class SignedUrls:
    """`base_url` is where hosts reach the API, `clock` gives seconds since the epoch."""

    def __init__(self, base_url: str, key: bytes, lifetime_s: float, clock: Callable[[], float] = time.time) -> None:
        self._base_url, self._key, self._lifetime_s, self._clock = base_url, key, lifetime_s, clock

    def url(self, method: str, image_id: str) -> str:
        expires = str(int(self._clock() + self._lifetime_s))
        return f"{self._base_url}{PATH}{image_id}?expires={expires}&signature={self._sign(method, image_id, expires)}"

    def check(self, method: str, image_id: str, expires: str, signature: str) -> None:
        """Raises Forbidden for a URL that is not one of ours, is of another method or image, or has expired."""
        if not hmac.compare_digest(signature.encode(), self._sign(method, image_id, expires).encode()):
            raise Forbidden("The URL is not signed by this cloud.")
        if not (expires.isdigit() and len(expires) <= EXPIRES_MAX_LENGTH) or self._clock() > int(expires):
            raise Forbidden("The URL has expired.")

    def _sign(self, method: str, image_id: str, expires: str) -> str:
        said = "\n".join((method, image_id, expires))
        return hmac.new(self._key, said.encode(), hashlib.sha256).hexdigest()
