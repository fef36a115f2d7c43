"""`instar api`, `instar conductor`, `instar storage`: the processes of a cloud that has many. And `instar cloud init`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import uvloop

from instar.cli.cloud_init import init_cloud
from instar.cli.log_format import FORMATS, LEVELS, configure_log
from instar.cli.plane_processes import ApiProcess, ConductorProcess, PlaneProcess, StorageProcess
from instar.cli.process import run_program, say_ready
from instar.cli.state_dir import StateDir, default_dir
from instar.config import Settings
from instar.settings_reading import load

DIR_HELP = "Of the state on this machine. [default: /var/lib/instar]"
_OPTIONS = (
    click.option("--config", type=click.Path(path_type=Path), help="The cloud's TOML file: see `instar config show`."),
    click.option("--dir", "directory", type=click.Path(path_type=Path), help=DIR_HELP),
    click.option("--log-format", type=click.Choice(FORMATS), default="console", show_default=True),
    click.option("--log-level", type=click.Choice(list(LEVELS)), help="[default: info]"),
)
_end_with_input = click.option("--end-with-input", is_flag=True, help="End when standard input does.")


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _prepared(
    config: Path | None, directory: Path | None, log_format: str, log_level: str | None
) -> tuple[StateDir, Settings]:
    settings = load(config)
    configure_log(log_format, log_level or settings.log_level)
    return StateDir(directory or default_dir(), cloud_id=settings.cloud_id), settings


def _run(process: type[PlaneProcess], end_with_input: bool, options: dict[str, Any]) -> None:
    state, settings = _prepared(**options)
    uvloop.run(run_program(process(state, settings), announce=say_ready, end_with_input=end_with_input))


@click.command()
@_options
@_end_with_input
def api(end_with_input: bool, **options: Any) -> None:
    """Answer every API of a cloud, until Ctrl-C or SIGTERM. Any number may run, on any number of machines.

    Several on one machine share the port when `api.port_shared` is set. Clients are told `api.public_url`.

    \b
    Example:
      instar api --config /etc/instar/instar.toml --dir /var/lib/instar
    """
    _run(ApiProcess, end_with_input, options)


@click.command()
@_options
@_end_with_input
def conductor(end_with_input: bool, **options: Any) -> None:
    """Run the operations of a cloud, until Ctrl-C or SIGTERM. Any number may run; they share the work.

    One that stops hands its operations to the others; those of one that was killed are taken over within seconds.

    \b
    Example:
      instar conductor --config /etc/instar/instar.toml
    """
    _run(ConductorProcess, end_with_input, options)


@click.command()
@_options
@_end_with_input
def storage(end_with_input: bool, **options: Any) -> None:
    """Own the volumes of a cloud that are in this directory, until Ctrl-C or SIGTERM. One for each directory.

    What serves volumes to guests goes on when it stops.

    \b
    Example:
      instar storage --config /etc/instar/instar.toml --dir /var/lib/instar
    """
    _run(StorageProcess, end_with_input, options)


@click.group()
def cloud() -> None:
    """A cloud of many processes, as a whole."""


@cloud.command("init")
@_options
def cloud_init(**options: Any) -> None:
    """Prepare the database of a cloud, for its first start and for each new version of Instar.

    Brings the database to this version's schema, and makes what is missing: first users, whose generated passwords go to
    DIR/clouds.yaml, the key of tokens, a network, flavors, the image `tiny`. May be run again at any time.

    \b
    Example:
      instar cloud init --config /etc/instar/instar.toml --dir /var/lib/instar
    """
    state, settings = _prepared(**options)
    uvloop.run(init_cloud(state, settings, progress=lambda text: click.echo(text, err=True)))
    click.echo(f"initialised: {state.clouds_yaml}")
