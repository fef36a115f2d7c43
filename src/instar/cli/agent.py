"""`instar agent`: the process on a host. It serves the host's queue on the bus of its cloud; it knows no database."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import uvloop

from instar.cli.host_processes import HostPlace, LibvirtHostProcess, SimulatedHostsProcess
from instar.cli.hosts.local_host import LocalHost
from instar.cli.log_format import FORMATS, LEVELS, configure_log
from instar.cli.process import Program, run_program, say_ready
from instar.cli.state_dir import MODE, StateDir, default_dir
from instar.errors import StartupError
from instar.file_lock import lock_within
from instar.settings_reading import load

LOCK_MAX_S = 20.0  # an agent before this one may take so long to end


@click.command()
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Of the state on this machine. [default: /var/lib/instar]"
)
@click.option("--host", "name", help="The name of this host; its state is kept in DIR/hosts/NAME.")
@click.option("--address", help="IPv4 address of this host, by which other hosts reach it; without it there are none.")
@click.option(
    "--libvirtd", type=click.Choice(["auto", "private"]), default="auto", show_default=True,
    help="auto: the system's where there is one.",
)  # fmt: skip
@click.option("--shares", type=click.IntRange(1), default=1, show_default=True, help="Hosts that share this machine.")
@click.option("--hypervisor", type=click.Choice(["libvirt", "simulated"]), default="libvirt", show_default=True)
@click.option("--hosts", type=click.IntRange(1, 100_000), default=1, show_default=True, help="How many simulated hosts.")
@click.option("--prefix", default="sim-", show_default=True, help="Names of simulated hosts begin so, a number follows.")
@click.option("--end-with-input", is_flag=True, help="End when standard input does: with who started this.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file: see `instar config show`.")
@click.option("--log-format", type=click.Choice(FORMATS), default="console", show_default=True)
@click.option("--log-level", type=click.Choice(list(LEVELS)), help="[default: info]")
def agent(
    directory: Path | None,
    name: str | None,
    address: str | None,
    libvirtd: str,
    shares: int,
    hypervisor: str,
    hosts: int,
    prefix: str,
    end_with_input: bool,
    config: Path | None,
    log_format: str,
    log_level: str | None,
) -> None:
    """Serve one host of a cloud, or many simulated ones, until Ctrl-C or SIGTERM. Guests go on when it stops.

    It connects to the bus that the settings name (`bus = "amqp://…"`); without one, to that of `instar up` on this machine,
    which starts an agent for each of its hosts by itself. It waits while there is no bus, and takes up its libvirtd and its
    guests where an earlier agent left them.

    \b
    Examples:
      instar agent --config /etc/instar/instar.toml --host node-7 --address 10.0.0.7
      instar agent --config /etc/instar/instar.toml --hypervisor simulated --hosts 200
    """
    settings = load(config)
    configure_log(log_format, log_level or settings.log_level)
    state = StateDir(directory or default_dir(), cloud_id=settings.cloud_id)
    simulated = hypervisor == "simulated"
    if simulated == bool(name):
        raise StartupError("Give --host its name, or --hypervisor simulated a number of --hosts.")
    host = LocalHost(state.hosts, name or f"{prefix}x")  # refuses what cannot be a name
    folder = state.path / "simulated" / host.name if simulated else host.directory
    if not settings.bus and not simulated and not folder.is_dir():
        raise StartupError(f"{state.path} has no host {name}.")
    folder.mkdir(mode=MODE, parents=True, exist_ok=True)
    with _alone(folder):
        process: Program
        if simulated:
            process = SimulatedHostsProcess(state, settings, folder, prefix=prefix, count=hosts)
        else:
            process = LibvirtHostProcess(state, settings, HostPlace(host, address, libvirtd, shares))
        uvloop.run(run_program(process, announce=say_ready, end_with_input=end_with_input))
        # A libvirt call that hangs must not hold us: its thread is not waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else serves this host until the end. Raises StartupError."""
    with (folder / "agent.lock").open("w") as lock:
        lock_within(lock, LOCK_MAX_S, f"Another agent serves host {folder.name}.")
        yield
