"""`instar distributed`: a cloud of many processes on this machine, to try things out, for the demo, tests and benches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from instar.cli.distributed.layout import Layout
from instar.cli.distributed.local_cloud import LocalCloud
from instar.cli.distributed.removal import remove_local_cloud
from instar.cli.log_format import FORMATS, configure_log
from instar.cli.process import say_ready
from instar.cli.up import SERVICES
from instar.errors import StartupError
from instar.settings_reading import describe, load

_dir = click.option("--dir", "directory", type=click.Path(path_type=Path), required=True, help="All state of the cloud.")


@click.group()
def distributed() -> None:
    """A cloud of many processes on this one machine: PostgreSQL, RabbitMQ, APIs, conductors, storage, agents."""


@distributed.command()
@_dir
@click.option("--apis", type=click.IntRange(1, 16), default=2, show_default=True)
@click.option("--conductors", type=click.IntRange(1, 16), default=2, show_default=True)
@click.option("--hosts", type=click.IntRange(0, 64), default=2, show_default=True, help="Hosts with libvirt: needs root.")
@click.option("--simulated", type=click.IntRange(0, 100_000), default=200, show_default=True, help="Simulated hosts.")
@click.option("--restarts/--no-restarts", default=True, show_default=True, help="Start again what dies.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting: --set engine.lease_s=3.")
@click.option("--log-format", type=click.Choice(FORMATS), default="console", show_default=True)
def up(
    directory: Path,
    apis: int,
    conductors: int,
    hosts: int,
    simulated: int,
    restarts: bool,
    assignments: tuple[str, ...],
    log_format: str,
) -> None:
    """Start such a cloud, and keep it running until Ctrl-C or SIGTERM. DIR can be started again, and keeps everything.

    Servers that ask for no zone go to hosts with libvirt; simulated ones are in the zone `simulated`, where there are both.
    Logs of the processes are in DIR/log. Settings come from INSTAR_* variables and from --set. Guests go on when it stops;
    `instar distributed down` ends them.

    \b
    Examples:
      instar distributed up --dir /srv/many
      instar distributed up --dir /tmp/many --hosts 0 --simulated 1000      needs no guests
      openstack server create --availability-zone simulated …              a guest that is a record
    """
    configure_log(log_format, "info")
    layout = Layout(
        apis=apis, conductors=conductors, libvirt_hosts=hosts, simulated_hosts=simulated, restarts=restarts,
        settings=settings_tree(assignments), log_format=log_format,
    )  # fmt: skip
    told = threading.Event()

    def stop(_number: int, _frame: object) -> None:
        # The first signal ends it in order; while it starts, by an exception that unwinds what was begun.
        if not told.is_set():
            told.set()
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    cloud = LocalCloud(directory, layout, say=lambda text: click.echo(text, err=True))
    try:
        cloud.start()
        _announce(cloud)
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("stopping", err=True)
    finally:
        told.set()
        cloud.close()


@distributed.command()
@_dir
@click.option("--delete", is_flag=True, help="Delete the directory too.")
def down(directory: Path, delete: bool) -> None:
    """End the guests of such a cloud, which must not run, its hosts, its servers and whatever is left of it.

    \b
    Example:
      instar distributed down --dir /srv/many --delete
    """
    configure_log("console", "warning")
    remove_local_cloud(directory.absolute(), delete=delete)
    click.echo(f"{directory}: {'deleted' if delete else 'nothing of it runs'}")


def _announce(cloud: LocalCloud) -> None:
    for name in cloud.processes.names:
        click.echo(f"  {name:14} {cloud.processes.pid(name)}")
    for name, path in SERVICES:
        click.echo(f"  {name:14} {cloud.url}{path}")
    click.echo("clouds `instar` (admin) and `instar-demo` (a member of project demo):")
    click.echo(f"  export OS_CLIENT_CONFIG_FILE={cloud.state.clouds_yaml}")
    say_ready(cloud.url)


def settings_tree(assignments: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """`section.name=value`, on top of INSTAR_* variables, as the TOML file has them. Raises StartupError; what a value is
    worth is found out with all other settings."""
    known = describe(load(None, environ))
    given: dict[str, object] = {info.name: info.value for info in known if info.value != info.default}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.rpartition(".")[2]:
            raise StartupError(f"--set {assignment}: write section.name=value.")
        given[name] = value
    tree: dict[str, Any] = {}
    for full_name, worth in given.items():
        section, _, last = full_name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[last] = worth
    return tree
