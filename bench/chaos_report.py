"""`make chaos`: a seeded run of random work and random kills on a private cloud of many processes, and its report."""

from __future__ import annotations

import collections
import logging
import random
import sys

import click
import structlog
import uvloop
from rich.console import Console
from rich.table import Table

from bench.chaos import RESULTS, ChaosRun
from bench.distributed import chaos

DETAILS_SHOWN = 20


@click.command()
@click.option("--seed", type=int, help="The same seed: the same choices. [default: a new one, which is printed]")
@click.option("--minutes", type=click.FloatRange(0.1, 60), default=10.0, show_default=True)
def main(seed: int | None, minutes: float) -> None:
    """Exit 1 when an operation is stuck, or the audit finds something."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    if seed is None:
        seed = random.randrange(1 << 16)
    click.echo(f"seed {seed}, {minutes:g} minutes", err=True)
    run, findings = uvloop.run(chaos(seed, minutes * 60))
    show(run)
    for finding in findings[:DETAILS_SHOWN]:
        click.echo(f"left: {finding}")
    click.echo(f"{len(findings)} findings of the audit, {run.count('stuck')} operations stuck")
    sys.exit(1 if findings or run.count("stuck") else 0)


def show(run: ChaosRun) -> None:
    """Operations by what became of them, kills, and what took longest."""
    table = Table(title=f"Chaos, seed {run.seed}: {len(run.outcomes)} operations", title_justify="left")
    for position, column in enumerate(("operation", *RESULTS, "longest, s")):
        table.add_column(column, justify="right" if position else "left")
    for action in sorted({one.action for one in run.outcomes}):
        mine = [one for one in run.outcomes if one.action == action]
        counts = collections.Counter(one.result for one in mine)
        longest = max(one.took_s for one in mine)
        table.add_row(action, *(str(counts[result]) for result in RESULTS), f"{longest:.1f}")
    Console(width=110).print(table)
    click.echo("kills: " + (", ".join(f"{name} {count}" for name, count in sorted(run.kills.items())) or "none"))
    click.echo(f"{run.retries} requests were sent again; longest: {run.longest.action}, {run.longest.took_s:.1f} s")
    for one in [one for one in run.outcomes if one.detail][:DETAILS_SHOWN]:
        click.echo(f"{one.result}: {one.detail}")


if __name__ == "__main__":
    main()
