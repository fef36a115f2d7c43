"""Microversions: which one a request asks for, the range that is served, and the version documents (decision 0006).

Inside, a microversion is the integer after the dot: 2.47 is 47.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from instar.errors import BadRequest, NotAcceptable

MINIMUM = 1
MAXIMUM = 96  # decision 0006: every change up to here is served for the resources that exist

_VERSION = re.compile(r"2\.([1-9]\d{0,3}|0)")
_SERVICE = "compute"
_UPDATED = "2013-07-23T11:33:21Z"  # what clients know as the date of version 2.1


def text(version: int) -> str:
    return f"2.{version}"


@lru_cache(maxsize=256)
def negotiate(modern: str, legacy: str) -> int:
    """The microversion that is asked for by `OpenStack-API-Version` (`compute 2.27`, perhaps among other services) or
    by the older `X-OpenStack-Nova-API-Version`; 2.1 where both are empty. Raises NotAcceptable, BadRequest."""
    asked = ""
    for part in modern.split(","):
        service, _, named = part.strip().partition(" ")
        if service.lower() == _SERVICE:
            asked = named.strip()
    wanted = asked or legacy.strip()
    if not wanted:
        return MINIMUM
    if wanted == "latest":
        return MAXIMUM
    match = _VERSION.fullmatch(wanted)
    if not match:
        if re.fullmatch(r"\d{1,4}\.\d{1,4}", wanted):
            raise NotAcceptable(version=wanted, minimum=text(MINIMUM), maximum=text(MAXIMUM))
        raise BadRequest(f"API Version String {wanted[:32]} is of invalid format. Must be of format MajorNum.MinorNum.")
    version = int(match[1])
    if not MINIMUM <= version <= MAXIMUM:
        raise NotAcceptable(version=wanted, minimum=text(MINIMUM), maximum=text(MAXIMUM))
    return version


def answer_headers(version: int) -> tuple[tuple[str, str], ...]:
    """What every answer says about the version it was made at: both headers, and Vary."""
    name = text(version)
    return (
        ("OpenStack-API-Version", f"compute {name}"),
        ("X-OpenStack-Nova-API-Version", name),
        ("Vary", "OpenStack-API-Version"),
        ("Vary", "X-OpenStack-Nova-API-Version"),
    )


def document(root_url: str) -> dict[str, Any]:
    """The answer of `GET /v2.1/`. `root_url` is the address of the compute mount, without a slash at its end."""
    return {"version": _version(root_url, media_types=True)}


def documents(root_url: str) -> dict[str, Any]:
    """The answer of `GET /`: every version that the mount has."""
    return {"versions": [_version(root_url, media_types=False)]}


def _version(root_url: str, *, media_types: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": "v2.1",
        "status": "CURRENT",
        "version": text(MAXIMUM),
        "min_version": text(MINIMUM),
        "updated": _UPDATED,
        "links": [{"rel": "self", "href": f"{root_url}/v2.1/"}],
    }
    if media_types:
        media = {"base": "application/json", "type": "application/vnd.openstack.compute+json;version=2.1"}
        found["media-types"] = [media]
        found["links"].append(
            {"rel": "describedby", "type": "text/html", "href": "https://docs.openstack.org/api-ref/compute/"}
        )
    return found
