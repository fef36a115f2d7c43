"""The table of measurements."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Skipped(Exception):
    """This machine cannot make the measurement; the text says why."""


class Row(NamedTuple):
    """One measurement; without a bound it is only told."""

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def budget(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:g} {self.unit}"
        return f"≥ {self.at_least:g} {self.unit}" if self.at_least is not None else ""

    @property
    def holds(self) -> bool | None:
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.value >= self.at_least if self.at_least is not None else None


def print_table(title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left", min_width=100)
    for column, justify in (("measured", "left"), ("value", "right"), ("budget", "right"), ("holds", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        holds = "" if row.holds is None else ("yes" if row.holds else "NO")
        table.add_row(row.what, f"{row.value:,.2f} {row.unit}", row.budget, holds)
    Console(width=110).print(table)
