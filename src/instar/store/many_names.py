"""Statements about many names, in groups whose texts are always the same: databases keep their plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instar.store.contract import Value

SIZES = (4, 32, 500)  # names in one statement; the largest is far below what databases take


def in_groups(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Value]]]:
    """What stands between the brackets of `IN (…)`, and the parameters: all names, in their order, in groups. One that is
    not full says its last name again."""
    for start in range(0, len(names), SIZES[-1]):
        some = names[start : start + SIZES[-1]]
        size = next(size for size in SIZES if size >= len(some))
        marks = ", ".join(f":n{number}" for number in range(size))
        yield marks, {f"n{number}": some[min(number, len(some) - 1)] for number in range(size)}
