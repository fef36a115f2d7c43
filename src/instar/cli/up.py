"""`instar up`: a whole cloud in this process, until SIGTERM or SIGINT."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import uvloop

from instar.cli.embedded import Embedded
from instar.cli.hosts.underlay import HOSTS_MAX
from instar.cli.log_format import FORMATS, LEVELS, configure_log
from instar.cli.process import run_program, say_ready
from instar.cli.state_dir import StateDir, default_dir
from instar.config import Settings
from instar.errors import StartupError
from instar.settings_reading import load

SERVICES = (
    ("identity", "/identity/v3"),
    ("compute", "/compute/v2.1"),
    ("image", "/image"),
    ("network", "/network"),
    ("volume", "/volume/v3"),
    ("operators", "/instar"),
)


@click.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="All state. [default: /var/lib/instar]")
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of every API; 0 takes a free one. [default: 8774]")
@click.option("--hypervisor", type=click.Choice(["libvirt", "simulated"]), help="[default: libvirt]")
@click.option("--hosts", type=click.IntRange(1, 100_000), help="How many hosts; with libvirt at most 64. [default: 1]")
@click.option("--config", "config", type=click.Path(path_type=Path), help="A TOML file: see `instar config show`.")
@click.option("--log-format", type=click.Choice(FORMATS), default="console", show_default=True)
@click.option("--log-level", type=click.Choice(list(LEVELS)), help="[default: info]")
def up(
    directory: Path | None,
    host: str | None,
    port: int | None,
    hypervisor: str | None,
    hosts: int | None,
    config: Path | None,
    log_format: str,
    log_level: str | None,
) -> None:
    """Start a cloud and keep it running until Ctrl-C or SIGTERM.

    Its guests go on when it stops, and it takes them up again when it starts. Prints `ready: URL` on standard output as
    soon as it answers; what it does is logged on standard error.

    \b
    Examples:
      instar up                                     real guests, state in the default directory
      instar up --dir /srv/a --port 8774            one cloud ...
      instar up --dir /srv/b --port 8775            ... and another beside it
      instar up --dir /srv/c --hosts 2              two hosts on this machine, each in namespaces of its own
      instar up --dir /tmp/x --hypervisor simulated --hosts 1000
      INSTAR_QUOTA_INSTANCES=50 instar up           a setting by its variable
    """
    settings = load(config)
    settings = _overridden(settings, host, port, hypervisor, hosts, log_level)
    configure_log(log_format, settings.log_level)
    uvloop.run(serve(StateDir(directory or default_dir(), cloud_id=settings.cloud_id), settings, log_format))


def _overridden(
    settings: Settings, host: str | None, port: int | None, hypervisor: str | None, hosts: int | None, level: str | None
) -> Settings:
    """Options win over the file and the variables. Raises StartupError for options that contradict each other."""
    replace = msgspec.structs.replace
    api = replace(settings.api, host=settings.api.host if host is None else host)
    api = replace(api, port=settings.api.port if port is None else port)
    settings = replace(settings, api=api, hypervisor=hypervisor or settings.hypervisor)
    settings = replace(settings, log_level=level or settings.log_level)
    if hosts is None:
        return settings
    if settings.hypervisor == "simulated":
        return replace(settings, simulated=replace(settings.simulated, hosts=hosts))
    if hosts > HOSTS_MAX:
        raise StartupError(f"This machine plays at most {HOSTS_MAX} hosts with libvirt.")
    return replace(settings, host=replace(settings.host, local_hosts=hosts))


async def serve(state: StateDir, settings: Settings, log_format: str = "console") -> None:
    """Start, say so, wait for a signal, stop."""
    embedded = Embedded(state, settings, progress=_progress, log_format=log_format)
    await run_program(embedded, announce=lambda url: _announce(url, state, settings))


def _progress(text: str) -> None:
    click.echo(text, err=True)


def _announce(url: str, state: StateDir, settings: Settings) -> None:
    click.echo(f"Instar, region {settings.region}, hypervisor {settings.hypervisor}")
    for name, path in SERVICES:
        click.echo(f"  {name:10} {url}{path}")
    if state.clouds_yaml.exists():
        click.echo("clouds `instar` (admin) and `instar-demo` (a member of project demo):")
        click.echo(f"  export OS_CLIENT_CONFIG_FILE={state.clouds_yaml}")
    say_ready(url)
