"""The demo's table: what each operation took, and whose time it was."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table


class Row(NamedTuple):
    """`seconds`: as the user waited. `hypervisor_s`: of it, the host's own work (a guest's shutdown included).
    `control_s`: the rest of the operation, which is ours; None where there is no operation in the journal. `guest_s`:
    waiting for the guest to boot, after the cloud had done its part."""

    operation: str
    ok: bool
    seconds: float
    hypervisor_s: float | None = None
    control_s: float | None = None
    guest_s: float | None = None
    remark: str = ""


class Story:
    """What the demo has to tell, also when it ended half-way."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.operation = ""  # the one that the diagram is of
        self.diagram = ""


def times_of(operation: dict[str, Any]) -> tuple[float, float]:
    """(seconds of the hypervisor, seconds of the control plane) of a finished operation from the operators' API."""
    total_us = operation["finished_at"] - operation["started_at"]
    hypervisor_us = sum(step["hypervisor_us"] for step in operation["steps"])
    return hypervisor_us / 1e6, max(0, total_us - hypervisor_us) / 1e6


def table_of(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("operation")
    table.add_column("result")
    for name in ("seconds", "hypervisor", "control plane", "then guest boot"):
        table.add_column(name, justify="right")
    table.add_column("seen", overflow="fold")
    for row in rows:
        table.add_row(
            row.operation, "ok" if row.ok else "FAILED", f"{row.seconds:.2f}", _seconds(row.hypervisor_s),
            _milliseconds(row.control_s), _seconds(row.guest_s), row.remark,
        )  # fmt: skip
    return table


def summary(rows: list[Row]) -> str:
    failed = sum(not row.ok for row in rows)
    return f"demo: {len(rows)} operations, {len(rows) - failed} ok, {failed} failed"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1000:.0f} ms"
