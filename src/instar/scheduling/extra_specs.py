"""The little language in which a flavor's extra spec asks for a value: `>= 4`, `s== ssd`, `<in> avx`, `<or> a <or> b`.

Numbers: = and == (at least, as the Compute API has it for =; equal for ==), !=, >=, <=. Text: s==, s!=, s<, s<=, s>, s>=.
`<in>`: the value contains the word; `<all-in>`: it contains all of the words; `<or>`: it is one of the words. Without an
operator the value must be the same text.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

_NUMBERS: dict[str, Callable[[float, float], bool]] = {
    "=": operator.ge, "==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le,
}  # fmt: skip
_TEXTS: dict[str, Callable[[str, str], bool]] = {
    "s==": operator.eq, "s!=": operator.ne, "s<": operator.lt, "s<=": operator.le, "s>": operator.gt,
    "s>=": operator.ge,
}  # fmt: skip


def satisfies(value: str, wanted: str) -> bool:
    """Whether a host's `value` is what the extra spec asks for. A number that is none satisfies nothing."""
    words = wanted.split()
    if not words:
        return value == wanted
    first, rest = words[0], words[1:]
    if first == "<or>":
        return value in (word for word in rest if word != "<or>")
    if first == "<in>":
        return all(word in value for word in rest if word != "<in>")
    if first == "<all-in>":
        return all(word in value for word in rest)
    if first in _TEXTS:
        return _TEXTS[first](value, " ".join(rest))
    if first in _NUMBERS:
        try:
            return _NUMBERS[first](float(value), float(" ".join(rest)))
        except ValueError:
            return False
    return value == wanted
