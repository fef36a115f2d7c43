"""Commands that show: `instar server …`, `instar admin …`, `instar config show`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from instar.cli.client import CloudClient, read_login
from instar.cli.clouds_yaml import ADMIN_CLOUD
from instar.cli.drain import drain
from instar.cli.state_dir import default_dir
from instar.cli.terminal import attach
from instar.settings_reading import URLS, describe, load, without_password

_dir = click.option("--dir", "directory", type=click.Path(path_type=Path), help="The directory of the running cloud.")
_cloud = click.option("--os-cloud", help="Its name in clouds.yaml. [default: OS_CLOUD, else instar]")
# Whoever works as a member all day is the operator here.
_admin_cloud = click.option("--os-cloud", default=ADMIN_CLOUD, show_default=True, help="Its name in clouds.yaml.")


def _client(directory: Path | None, cloud: str | None) -> CloudClient:
    return CloudClient(read_login(directory, default_dir(), cloud))


def new_table(*columns: str) -> Table:
    """With these headers, for `print_table`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """To the terminal at its width; into a file or a pipe without cutting."""
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(table)


@click.group()
def server() -> None:
    """What happened to servers, and their serial lines."""


@server.command("diagram")
@click.argument("server_id")
@click.option("--action", "request_id", metavar="REQUEST_ID", help="Of the operation; without it the newest is shown.")
@click.option("--format", "notation", type=click.Choice(["text", "mermaid"]), default="text", show_default=True)
@_dir
@_cloud
def server_diagram(
    server_id: str, request_id: str | None, notation: str, directory: Path | None, os_cloud: str | None
) -> None:
    """The sequence diagram of what really happened, drawn from the operation's journal.

    `text` is the notation of websequencediagrams. Request ids: `openstack server event list SERVER`.

    \b
    Examples:
      instar server diagram 6f6a5b0e-…                            the last operation
      instar server diagram 6f6a5b0e-… --action req-0b1f…         a certain one
      instar server diagram 6f6a5b0e-… --format mermaid > create.mmd
    """
    path = f"/v1/servers/{_segment(server_id)}/diagram"
    text = _client(directory, os_cloud).get(path, request_id=request_id, format=notation)
    click.echo(text.decode(), nl=False)


@server.command("console")
@click.argument("name", metavar="SERVER")
@_dir
@_cloud
def server_console(name: str, directory: Path | None, os_cloud: str | None) -> None:
    """This terminal on the serial line of a server, named by its name or id. Ctrl-] leaves it.

    What is typed goes to the guest as it is, Ctrl-C too. One terminal at a time: the newest has the line.

    \b
    Example:
      instar server console first --dir /srv/cloud
    """
    attach(_client(directory, os_cloud), name)


def _segment(text: str) -> str:
    if not text or not all(letter.isalnum() or letter in "-_" for letter in text):
        raise click.BadParameter("a server is named by its id", param_hint="SERVER_ID")
    return text


@click.group()
def admin() -> None:
    """For the operator of a running cloud."""


admin.add_command(drain)


@admin.command("hosts")
@_dir
@_admin_cloud
def admin_hosts(directory: Path | None, os_cloud: str) -> None:
    """Every host: up or down, and what is claimed of what it may give out.

    \b
    Example:
      instar admin hosts --dir /srv/a
    """
    hosts = _client(directory, os_cloud).get_json("/v1/hosts")["hosts"]
    table = new_table("host", "state", "zone", "type", "servers", "busy", "vcpus", "memory MiB", "disk GiB", "agent")
    for host in hosts:
        table.add_row(*_host_cells(host))
    print_table(table)
    click.echo(f"{len(hosts)} hosts, {sum(host['state'] == 'up' for host in hosts)} up")


def _host_cells(host: dict[str, Any]) -> list[str]:
    state = host["state"] if host["enabled"] else f"{host['state']}, disabled ({host['disabled_reason'] or 'no reason'})"
    amounts = [f"{host[f'{name}_claimed' + unit]}/{host[name + unit]}" for name, unit in AMOUNTS]
    return [
        host["name"], state, host["zone"], host["virt_type"], str(host["instances"]), str(host["operations"]), *amounts,
        host.get("agent_version", ""),
    ]  # fmt: skip


AMOUNTS = (("vcpus", ""), ("memory", "_mib"), ("disk", "_gib"))


@admin.command("operations")
@_dir
@_admin_cloud
def admin_operations(directory: Path | None, os_cloud: str) -> None:
    """Operations in flight, oldest first, with the conductor that runs each."""
    answer = _client(directory, os_cloud).get_json("/v1/operations")
    table = new_table("operation", "server", "request", "conductor", "epoch")
    for one in answer["operations"]:
        owner = one["owner"] or "nobody yet"
        table.add_row(one["rule"], one["server_id"], one["request_id"], owner, str(one["epoch"]))
    print_table(table)
    click.echo(f"{answer['total']} in flight")


@admin.command("audit")
@_dir
@_admin_cloud
def admin_audit(directory: Path | None, os_cloud: str) -> None:
    """Hold what is on every host against what should be: guests, disks, taps, ports, claims, states, quotas.

    Prints one line for each thing without an owner, and for each record without its thing. Exit status 1 when there is
    any, 0 when all is well. The cloud's reconciler repairs most of it by itself.

    \b
    Example:
      instar admin audit --dir /srv/a && echo clean
    """
    answer = _client(directory, os_cloud).get_json("/v1/audit")
    findings = answer["findings"]
    for finding in findings:
        where = f" on {finding['host']}" if finding["host"] else ""
        click.echo(f"{finding['kind']}: {finding['subject']}{where}")
    click.echo(f"{answer['hosts']} hosts asked, {len(findings)} findings")
    sys.exit(1 if findings else 0)


@click.group()
def config() -> None:
    """Settings."""


@config.command("show")
@click.option("--config", "path", type=click.Path(path_type=Path), help="The TOML file that `instar up` would be given.")
def config_show(path: Path | None) -> None:
    """Every setting: its value here, default, unit and purpose.

    A setting `section.name` is `name` in the table `[section]` of the TOML file, or the variable INSTAR_SECTION_NAME.

    \b
    Examples:
      instar config show
      INSTAR_QUOTA_CORES=64 instar config show --config /etc/instar.toml
    """
    table = new_table("setting", "value", "default", "unit", "what it is for")
    for info in describe(load(path)):
        default = "=" if info.value == info.default else _plain(info.default)
        value = without_password(str(info.value)) if info.name in URLS else _plain(info.value)
        table.add_row(info.name, value, default, info.unit, info.description)
    print_table(table)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", text)  # of URLs with a password
