"""`instar host`: the hosts that this machine plays, from outside: look inside one, pull its plug, switch it on again."""

from __future__ import annotations

import os
from pathlib import Path

import click

from instar.cli.hosts.local_host import LocalHost, check_machine
from instar.cli.state_dir import default_dir
from instar.errors import StartupError

_dir = click.option("--dir", "directory", type=click.Path(path_type=Path), help="Of the cloud. [default: /var/lib/instar]")
_name = click.argument("name")


def _host(directory: Path | None, name: str) -> LocalHost:
    check_machine()
    host = LocalHost((directory or default_dir()).absolute() / "hosts", name)
    if not host.directory.is_dir():
        raise StartupError(f"There is no host {name} in {host.directory.parent}.")
    return host


@click.group()
def host() -> None:
    """Hosts that this machine plays: see `instar up --hosts`."""


@host.command("exec", context_settings={"ignore_unknown_options": True})
@_dir
@_name
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def host_exec(directory: Path | None, name: str, command: tuple[str, ...]) -> None:
    """Run a command in the namespaces of a host: guests that are on it are reached from there.

    \b
    Examples:
      instar host exec --dir /srv/a host-1 -- busybox ping -c 3 10.0.0.5
      instar host exec --dir /srv/a host-1 -- ssh -i KEY root@10.0.0.5
      instar host exec --dir /srv/a host-2 -- ip address
    """
    argv = _host(directory, name).inside(*command)
    os.execvp(argv[0], argv)  # noqa: S606 - the command is the operator's own, and no shell reads it


@host.command("power-off")
@_dir
@_name
def host_power_off(directory: Path | None, name: str) -> None:
    """Pull the plug of a host: every process of it is killed at once, its guests and its libvirtd too.

    Its disks stay. It remains off, also over restarts of the cloud, until `instar host power-on`.
    """
    _host(directory, name).power_off()


@host.command("power-on")
@_dir
@_name
def host_power_on(directory: Path | None, name: str) -> None:
    """Switch a host on again: the running cloud starts it, and then the guests that should run on it."""
    _host(directory, name).power_on()
