"""Conditions of a statement, put together with their parameters. Used by the SQL of the other files.

Expressions and columns are names that stand in the code; what comes from outside is always a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from instar.store.contract import Value


def any_of(column: str, values: Sequence[str], params: dict[str, Value], prefix: str) -> str:
    """`column IN (…)` with the values added to `params` under names that start with `prefix`; no value: false."""
    if not values:
        return "1 = 0"
    names = []
    for index, value in enumerate(values):
        name = f"{prefix}{index}"
        params[name] = value
        names.append(f":{name}")
    return f"{column} IN ({', '.join(names)})"


class Conditions:
    """Those of one SELECT, gathered one after the other. Each parameter is numbered."""

    def __init__(self) -> None:
        self.conditions: list[str] = []
        self.params: dict[str, Value] = {}

    def value(self, value: Value) -> str:
        """The placeholder that stands for this value."""
        name = f"p{len(self.params)}"
        self.params[name] = value
        return f":{name}"

    def values(self, values: Iterable[Value]) -> str:
        """What stands between the brackets of `IN (…)`."""
        return ", ".join([self.value(value) for value in values])

    def add(self, condition: str) -> None:
        self.conditions.append(condition)

    def add_after(self, order: Iterable[tuple[str, bool, Value]]) -> None:
        """The rows behind a marker: (a > A) OR (a = A AND b > B) …, for (expression, ascending, the marker's value) in the
        order of sorting; directions may be mixed."""
        alternatives: list[str] = []
        equal: list[str] = []
        for expression, ascending, found in order:
            marker = self.value(found)
            alternatives.append(" AND ".join([*equal, f"{expression} {'>' if ascending else '<'} {marker}"]))
            equal.append(f"{expression} = {marker}")
        self.add("(" + " OR ".join(f"({alternative})" for alternative in alternatives) + ")")
