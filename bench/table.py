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


class Sheet(NamedTuple):
    """A table with columns of its own: the first says what was measured, the others what came out. `notes` go below."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def print_sheet(title: str, sheet: Sheet) -> None:
    table = Table(title=title, title_justify="left", min_width=100)
    for position, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if position else "left")
    for row in sheet.rows:
        table.add_row(*row)
    console = Console(width=110)
    console.print(table)
    for note in sheet.notes:
        console.print(note, highlight=False)


def print_table(title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left", min_width=100)
    for column, justify in (("measured", "left"), ("value", "right"), ("budget", "right"), ("holds", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        holds = "" if row.holds is None else ("yes" if row.holds else "NO")
        table.add_row(row.what, f"{row.value:,.2f} {row.unit}", row.budget, holds)
    Console(width=110).print(table)
