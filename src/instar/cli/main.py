"""The program `instar`: its commands, and how it ends. An error that has a name is one line on standard error, exit 1."""

from __future__ import annotations

import sys

import click

from instar import __version__
from instar.cli.agent import agent
from instar.cli.build_image import image
from instar.cli.bus_admin import admin_bus_user, admin_dead_letters
from instar.cli.database import db
from instar.cli.demo.command import demo
from instar.cli.distributed.command import distributed
from instar.cli.down import down
from instar.cli.host import host
from instar.cli.plane import api, cloud, conductor, storage
from instar.cli.show import admin, config, server
from instar.cli.up import up
from instar.errors import InstarError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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


for command in (up, down, demo, image, server, admin, host, api, conductor, storage, agent, cloud, distributed, db, config):
    instar.add_command(command)

for command in (admin_dead_letters, admin_bus_user):
    admin.add_command(command)


def main() -> None:
    """What the installed program calls."""
    try:
        instar()
    except InstarError as error:
        click.echo(f"instar: {error.message}", err=True)
        sys.exit(1)
