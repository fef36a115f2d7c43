"""Commands about the bus of a cloud of many processes: `instar admin dead-letters`, `instar admin bus-user`."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import click

from instar.bus.permissions import agent_user, host_permissions, user_of
from instar.cli.client import CloudClient, read_login
from instar.cli.clouds_yaml import ADMIN_CLOUD
from instar.cli.servers.bus_users import ensure_user, password_in, remove_user
from instar.cli.servers.rabbitmq import PrivateRabbitMq
from instar.cli.show import new_table, print_table
from instar.cli.state_dir import default_dir
from instar.errors import StartupError

CTL_MAX_S = 60.0


@click.command("dead-letters")
@click.option("--purge", is_flag=True, help="Drop them all.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="The directory of the running cloud.")
@click.option("--os-cloud", default=ADMIN_CLOUD, show_default=True, help="Its name in clouds.yaml.")
def admin_dead_letters(purge: bool, directory: Path | None, os_cloud: str) -> None:
    """Commands that nobody will do any more: their deadline passed, or their agents died over them again and again.

    Nothing waits for them: whoever sent them has been told, or was taken over. They show what went wrong.
    """
    client = CloudClient(read_login(directory, default_dir(), os_cloud))
    if purge:
        click.echo(f"{client.delete_json('/v1/dead-letters')['purged']} dropped")
        return
    letters = client.get_json("/v1/dead-letters")["dead_letters"]
    table = new_table("time", "queue", "kind", "reason", "sender", "epoch", "id")
    for one in letters:
        time = datetime.fromtimestamp(one["died_at"] / 1_000_000, UTC).isoformat(timespec="seconds")
        table.add_row(time, one["queue"], one["kind"], one["reason"], one["sender"], str(one["epoch"]), one["id"])
    print_table(table)
    click.echo(f"{len(letters)} dead letters")


@click.command("bus-user")
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
@click.option("--agent", default="", help="The name of an agent that serves all these hosts together.")
@click.option("--vhost", default="/", show_default=True, help="Of the broker, where the cloud's bus is.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Made with mode 0600, or read where it is there.")
@click.option("--private", type=click.Path(path_type=Path), help="The directory of a private broker; else the system's.")
@click.option("--remove", is_flag=True, help="The user goes, and its connections end.")
def admin_bus_user(
    hosts: tuple[str, ...], agent: str, vhost: str, password_file: Path | None, private: Path | None, remove: bool
) -> None:
    """Make the user as which a host's agent logs in to RabbitMQ, with no more permissions than it needs.

    Run on the broker's machine, by who may use rabbitmqctl. The password is written into a file, which goes to the host;
    the two settings that are printed, too. Running it again sets the permissions anew, and the password to the file's.

    \b
    Examples:
      instar admin bus-user compute-1 --vhost instar --password-file compute-1.password
      instar admin bus-user sim-0 sim-1 sim-2 --agent simulated --password-file simulated.password
      instar admin bus-user compute-1 --remove
    """
    if len(hosts) > 1 and not agent:
        raise click.UsageError("Several hosts of one agent need its name: --agent.")
    control = PrivateRabbitMq(private).control if private else _system_control
    try:
        user = agent_user(agent) if agent else user_of(hosts[0])
        permissions = host_permissions(list(hosts), agent=agent)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if remove:
        remove_user(control, user)
        return
    if password_file is None:
        raise click.UsageError("Say where the password goes: --password-file.")
    ensure_user(control, vhost, user, permissions, password_in(password_file))
    click.echo(f"bus = \"amqps://{user}@BROKER/{'%2F' if vhost == '/' else vhost}\"")
    click.echo(f'[rabbitmq]\npassword_file = "{password_file.absolute()}"')


def _system_control(*arguments: str, stdin: str = "") -> str:
    try:
        done = subprocess.run(
            ["rabbitmqctl", "-q", *arguments], input=stdin, capture_output=True, text=True, timeout=CTL_MAX_S, check=False
        )
    except OSError as error:
        raise StartupError("rabbitmqctl cannot be run here: this is done on the broker's machine.") from error
    if done.returncode != 0:
        raise StartupError(f"rabbitmqctl {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout
