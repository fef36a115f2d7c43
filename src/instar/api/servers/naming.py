"""Names that follow from names: the host name of a guest, and the names of several servers built at once."""

from __future__ import annotations

import re

from instar.errors import BadRequest

LABEL_MAX = 63
FQDN_SINCE = 94
_LABEL = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9\-]{0,61}[a-zA-Z0-9])?")


def default_hostname(name: str, instance_id: str) -> str:
    """A host name made of a server's name: letters, digits, dots and hyphens of it; one of its id when none are left."""
    text = re.sub(r"[ _]", "-", name).encode("ascii", "ignore").decode()
    text = re.sub(r"[^\w.\-]+", "", text).lower().strip(".-")
    # A dot would make a domain name of it, and of the name's last part a top-level domain.
    text = text.replace(".", "-")[:LABEL_MAX].rstrip("-")
    return text or f"server-{instance_id}"


def check_hostname(hostname: str, version: int, where: str = "server") -> str:
    """A host name that a user gave: one label, from 2.94 a domain name. Raises BadRequest."""
    labels = hostname.split(".") if version >= FQDN_SINCE else [hostname]
    if all(_LABEL.fullmatch(label) for label in labels):
        return hostname
    raise BadRequest(f"Invalid input: {where}.hostname: {hostname[:80]!r} is not a valid host name.")


def numbered(name: str, index: int, count: int) -> str:
    """The name of one of `count` servers that are built by one request."""
    return name if count == 1 else f"{name}-{index + 1}"
