"""`instar admin drain`: everything that can leave a host does, watched from a terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from instar.cli.client import CloudClient, read_login
from instar.cli.clouds_yaml import ADMIN_CLOUD
from instar.cli.state_dir import default_dir

LOOK_EVERY_S = 0.5
ENDED = ("done", "aborted")


@click.command("drain")
@click.argument("host")
@click.option("--auto", "mode", flag_value="auto", default=True, help="What runs live, what is stopped cold. [default]")
@click.option("--live", "mode", flag_value="live", help="Only live: what does not run stays.")
@click.option("--cold", "mode", flag_value="cold", help="What runs is shut down, moved, and started there.")
@click.option("--concurrency", type=click.IntRange(1, 100), default=2, show_default=True, help="Servers moved at once.")
@click.option("--abort", is_flag=True, help="Begin nothing more, abort what moves live; other moves come to their end.")
@click.option("--status", is_flag=True, help="Only tell how far it is.")
@click.option("--no-wait", is_flag=True, help="Return when it has begun.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="The directory of the running cloud.")
@click.option("--os-cloud", default=ADMIN_CLOUD, show_default=True, help="Its name in clouds.yaml.")
def drain(
    host: str,
    mode: str,
    concurrency: int,
    abort: bool,
    status: bool,
    no_wait: bool,
    directory: Path | None,
    os_cloud: str,
) -> None:
    """Empty a host: disable it, and move every server elsewhere. What cannot be moved is left, with the reason.

    It goes on in the cloud, over restarts of anything, also when this command is interrupted; call it with --status to
    look again. Afterwards the host stays disabled: `openstack compute service set --enable HOST nova-compute`. Exit status
    1 when something was left.

    \b
    Examples:
      instar admin drain host-1 --dir /srv/a
      instar admin drain host-1 --cold --concurrency 8
      instar admin drain host-1 --status
      instar admin drain host-1 --abort
    """
    if not host or not all(letter.isalnum() or letter in "-_." for letter in host):
        raise click.BadParameter("a host is named by its name", param_hint="HOST")
    client = CloudClient(read_login(directory, default_dir(), os_cloud))
    path = f"/v1/hosts/{host}/drain"
    if abort:
        seen = client.delete_json(path)
    elif status:
        seen = client.get_json(path)
    else:
        seen = client.post_json(path, {"mode": mode, "concurrency": concurrency})
    told = _line(seen)
    click.echo(told)
    while not (status or no_wait or seen["status"] in ENDED):
        time.sleep(LOOK_EVERY_S)
        seen = client.get_json(path)
        if _line(seen) != told:
            told = _line(seen)
            click.echo(told)
    for one in seen["servers"]:
        if one["status"] in ("left", "again"):
            click.echo(f"  {one['server_id']}: {one['status']}: {one['reason']}")
    sys.exit(1 if seen["left"] else 0)


def _line(seen: dict[str, Any]) -> str:
    counts = ", ".join(f"{seen[name]} {name}" for name in ("moved", "moving", "waiting", "left"))
    return f"{seen['host']}: {seen['status']} ({seen['mode']}): {counts}"
