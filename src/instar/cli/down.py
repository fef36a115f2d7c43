"""`instar down`: nothing of a cloud is left on this machine, its records and images aside."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import click

from instar.cli.embedded import remove_everything
from instar.cli.hosts.local_hosts import remove_local_hosts
from instar.cli.log_format import configure_log
from instar.cli.state_dir import StateDir, default_dir
from instar.errors import StartupError
from instar.volumes.local import remove_exports

# What only a cloud with real guests has in its directory.
LIBVIRT_TRACES = ("libvirt", "instances", "cache", "network")


@click.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Of the cloud. [default: /var/lib/instar]")
@click.option("--delete", is_flag=True, help="Delete the directory too: records, images, passwords.")
def down(directory: Path | None, delete: bool) -> None:
    """End all guests of a cloud that is not running, with their disks, and remove its networks and its libvirtd.

    A cloud that only stopped (Ctrl-C of `instar up`) leaves its guests running: this ends them. Guests' disks are gone
    afterwards. Refuses while the cloud runs.

    \b
    Examples:
      instar down --dir /srv/a              guests, disks and networks are gone; records, images and volumes stay
      instar down --dir /srv/a --delete     nothing stays
    """
    path = (directory or default_dir()).absolute()
    if not path.exists():
        click.echo(f"{path} is not there: nothing to do.")
        return
    if not (path / "cloud-id").exists() and not (path / "instar.db").exists():
        raise StartupError(f"{path} is not the directory of a cloud.")
    if (path / "postgresql").is_dir():
        raise StartupError(f"{path} is a cloud of many processes: instar distributed down --dir {path}")
    configure_log("console", "warning")
    state = StateDir(path)
    if any((path / name).exists() for name in LIBVIRT_TRACES):
        asyncio.run(remove_everything(state))
    state.lock()  # a cloud with simulated hosts only; and nobody starts while its directory goes
    try:
        if state.hosts.is_dir():
            asyncio.run(remove_local_hosts(state.cloud_id, state.hosts))
            shutil.rmtree(state.hosts)
            state.bus_socket.unlink(missing_ok=True)
        remove_exports(state.path)  # its guests are gone: nobody reads their volumes any more
        state.simulated_log.unlink(missing_ok=True)
        if delete:
            shutil.rmtree(path)
    finally:
        state.unlock()
    click.echo(f"{path}: {'deleted' if delete else 'nothing of it is left on this host'}")
