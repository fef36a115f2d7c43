"""`make bench`: measure DESIGN's numbers and print each beside its budget. What cannot be measured here is said."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Awaitable, Callable

import click
import structlog
import uvloop

from bench.control_plane import control_plane
from bench.distributed import crashes, distributed
from bench.libvirt_life import libvirt_life
from bench.libvirt_moves import libvirt_moves
from bench.libvirt_overhead import libvirt_overhead
from bench.many_hosts import many_hosts
from bench.operations import operations
from bench.recovery import recovery
from bench.scheduling import scheduling
from bench.table import Row, Sheet, Skipped, print_sheet, print_table

PARTS: dict[str, tuple[str, Callable[[], Awaitable[list[Row] | Sheet]]]] = {
    "control-plane": ("Control plane (embedded, simulated hypervisor)", control_plane),
    "operations": ("Operations, control-plane time (embedded, simulated hypervisor)", operations),
    "scheduling": ("Scheduling (10,000 hosts, in process)", scheduling),
    "libvirt": ("Overhead on libvirt (real guests)", libvirt_overhead),
    "life": ("Whole life on libvirt (real guests) against bare libvirt and qemu-img", libvirt_life),
    "distributed": ("Distributed (two APIs, two conductors, PostgreSQL, RabbitMQ, simulated hosts)", distributed),
    "crashes": ("Crashes (distributed, simulated hosts that take 3 s)", crashes),
    "many-hosts": ("Ten thousand hosts (distributed, simulated)", many_hosts),
    "moves": ("Moves between two hosts with libvirt (real guests)", libvirt_moves),
    "recovery": ("Recovery (kill -9, simulated hypervisor)", recovery),
}


@click.command()
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="Measure this part alone; may be repeated.")
def main(only: tuple[str, ...]) -> None:
    """Measure, and print a table for each part. Exit 1 only when a measurement could not be made."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    failed = False
    for name in only or tuple(PARTS):
        title, measure = PARTS[name]
        try:
            found = uvloop.run(_measured(measure))
            if isinstance(found, Sheet):
                print_sheet(title, found)
            else:
                print_table(title, found)
        except Skipped as reason:
            click.echo(f"{title}: not measured, {reason}")
        except Exception:
            failed = True
            click.echo(f"{title}: could not be measured", err=True)
            traceback.print_exc()
    sys.exit(1 if failed else 0)


async def _measured(measure: Callable[[], Awaitable[list[Row] | Sheet]]) -> list[Row] | Sheet:
    return await asyncio.ensure_future(measure())


if __name__ == "__main__":
    main()
