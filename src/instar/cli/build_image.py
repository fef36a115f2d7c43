"""`instar image build-guest`: the small guest image, as a file."""

from __future__ import annotations

from pathlib import Path

import click

from instar.cli.guest_image import cache_dir
from instar.images.guest import build_guest


@click.group()
def image() -> None:
    """Guest images."""


@image.command("build-guest")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The qcow2 file to write.")
def build_guest_command(output: Path) -> None:
    """Build the small bootable guest image from Debian packages, in some seconds and without root.

    The guest gets its addresses by DHCP, reads its config drive, runs an ssh server with the key that it was given, and
    tells its boots and addresses on the serial console. Packages are downloaded once; later builds need no network.

    \b
    Example:
      instar image build-guest --output tiny.qcow2
      openstack --os-cloud instar image create --disk-format qcow2 --container-format bare --file tiny.qcow2 mine
    """
    built = build_guest(output, work_dir=cache_dir() / "guest", progress=lambda line: click.echo(line, err=True))
    click.echo(f"{built.path}  {built.size_bytes} bytes  sha256:{built.sha256}")
