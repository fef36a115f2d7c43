"""The roles that the cloud is born with, and what they imply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

BUILT_IN = ("admin", "manager", "member", "reader", "service")
IMPLIES: Mapping[str, str] = {"admin": "manager", "manager": "member", "member": "reader"}


def with_implied(names: Iterable[str]) -> frozenset[str]:
    """Role names with all that they imply: admin → manager → member → reader."""
    found: set[str] = set()
    for name in names:
        role: str | None = name
        while role is not None and role not in found:
            found.add(role)
            role = IMPLIES.get(role)
    return frozenset(found)
