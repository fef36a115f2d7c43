"""The program `instar`: its commands, and how it ends. An error that has a name is one line on standard error, exit 1."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

import click

from instar import __version__
from instar.errors import InstarError


class _Place(NamedTuple):
    """Where a command is: it is loaded when it is called, for a process needs little of all that the program can do."""

    module: str
    name: str


COMMANDS = {
    "up": _Place("up", "up"),
    "down": _Place("down", "down"),
    "demo": _Place("demo.command", "demo"),
    "image": _Place("build_image", "image"),
    "server": _Place("show", "server"),
    "admin": _Place("admin", "admin"),
    "host": _Place("host", "host"),
    "api": _Place("plane", "api"),
    "conductor": _Place("plane", "conductor"),
    "storage": _Place("plane", "storage"),
    "agent": _Place("agent", "agent"),
    "cloud": _Place("plane", "cloud"),
    "distributed": _Place("distributed.command", "distributed"),
    "db": _Place("database", "db"),
    "config": _Place("show", "config"),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        command = getattr(import_module(f"instar.cli.{place.module}"), place.name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="instar")
def instar() -> None:
    """A compute cloud in one program: the OpenStack Compute API on libvirt/QEMU guests, crash-safe.

    \b
    See it work, from an empty machine to a guest that answers ping:
      instar demo
    Start a cloud, and use it with OpenStack's own client:
      instar up --dir /srv/cloud
      export OS_CLIENT_CONFIG_FILE=/srv/cloud/clouds.yaml
      openstack --os-cloud instar server create --image tiny --flavor m1.nano --network private --wait first
    See what really happened:
      instar server diagram SERVER_ID --dir /srv/cloud
    """


def main() -> None:
    """What the installed program calls."""
    try:
        instar()
    except InstarError as error:
        click.echo(f"instar: {error.message}", err=True)
        sys.exit(1)
