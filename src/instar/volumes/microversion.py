"""Microversions of the Block Storage API: which one a request asks for, the range that is served, the version document.

Inside, a microversion is the integer after the dot: 3.27 is 27.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from instar.errors import BadRequest, NotAcceptable
from instar.http.answer import Header
from instar.http.request import Request

MAXIMUM = 54  # every change up to here is served for the resources that exist (decision 0011)

SUMMARY = 12
GROUP_ID = 13
PROVIDER_ID = 21
ATTACHMENTS = 27
NAME_LIKE = 34
SUMMARY_METADATA = 36
REVERT = 40
SNAPSHOT_USER = 41
EXTEND_IN_USE = 42
COMPLETE = 44
COUNT = 45
SHARED_TARGETS = 48
ATTACH_MODE = 54

_VERSION = re.compile(r"3\.([1-9]\d{0,3}|0)")
_SERVICES = ("volume", "block-storage", "volumev3")


def text(version: int) -> str:
    return f"3.{version}"


def negotiate(request: Request) -> None:
    """The microversion of a request, kept in it, and the headers that tell it. Raises NotAcceptable, BadRequest."""
    request.microversion = _asked(request.header(b"openstack-api-version"))
    request.answer_headers.extend(_headers(request.microversion))


@lru_cache(maxsize=256)
def _asked(header: str) -> int:
    wanted = ""
    for part in header.split(","):
        service, _, named = part.strip().partition(" ")
        if service.lower() in _SERVICES:
            wanted = named.strip()
    if not wanted:
        return 0
    if wanted == "latest":
        return MAXIMUM
    match = _VERSION.fullmatch(wanted)
    if match is None and not re.fullmatch(r"\d{1,4}\.\d{1,4}", wanted):
        raise BadRequest(f"API Version String {wanted[:32]} is of invalid format. Must be of format MajorNum.MinorNum.")
    if match is None or int(match[1]) > MAXIMUM:
        raise NotAcceptable(version=wanted, minimum=text(0), maximum=text(MAXIMUM))
    return int(match[1])


@lru_cache(maxsize=256)
def _headers(version: int) -> tuple[Header, ...]:
    return ((b"openstack-api-version", f"volume {text(version)}".encode()), (b"vary", b"OpenStack-API-Version"))


def document(base_url: str) -> dict[str, Any]:
    """The answer of `GET /` and `GET /v3/`. `base_url` is the address of the mount, without a slash at its end."""
    version = {
        "id": "v3.0",
        "status": "CURRENT",
        "version": text(MAXIMUM),
        "min_version": text(0),
        "updated": "2026-01-01T00:00:00Z",
        "links": [
            {"rel": "describedby", "type": "text/html", "href": "https://docs.openstack.org/api-ref/block-storage/"},
            {"rel": "self", "href": f"{base_url}/v3/"},
        ],
        "media-types": [{"base": "application/json", "type": "application/vnd.openstack.volume+json;version=3"}],
    }
    return {"versions": [version]}
