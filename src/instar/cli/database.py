"""Commands of the database: `instar db copy`, `instar db migrate`."""

from __future__ import annotations

from pathlib import Path

import click
import uvloop

from instar.cli.backends import open_store
from instar.cli.database_copy import Source, copy_database
from instar.cli.log_format import configure_log
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.errors import StartupError
from instar.settings_reading import load, without_password

_config = click.option("--config", "config", type=click.Path(path_type=Path), help="A TOML file: see `instar config show`.")


@click.group()
def db() -> None:
    """The database of a cloud: moving to PostgreSQL, its schema."""
    configure_log("console", "warning")  # what the commands say themselves is enough


@db.command("copy")
@click.argument("source")
@click.argument("target", required=False)
@_config
def db_copy(source: str, target: str | None, config: Path | None) -> None:
    """Copy a stopped cloud's database from SQLite to PostgreSQL.

    SOURCE is sqlite:///path/of/instar.db, TARGET an empty database (postgresql://user@host:port/name; without it the
    setting `database`, so that no password stands in a list of processes). The source stays as it is. A copy that was
    interrupted goes on when the same command is run again. Images, volumes and keys stay in the cloud's directory: start
    it there again, with the setting `database`.

    \b
    Examples:
      instar db copy sqlite:///srv/cloud/instar.db postgresql://instar@db.example/cloud
      INSTAR_DATABASE=postgresql://instar@db.example/cloud instar up --dir /srv/cloud
    """
    settings = load(config)
    url = target or settings.database
    if not url.startswith(("postgresql://", "postgres://")):
        raise StartupError("The target must be a PostgreSQL database: postgresql://user@host:port/name.")
    if not source.startswith("sqlite:///"):
        raise StartupError("The source must be an SQLite database: sqlite:///path/of/instar.db.")
    path = Path("/") / source.removeprefix("sqlite:///")
    if not path.is_file():
        raise StartupError(f"There is no database {path}.")
    state = StateDir(path.parent)
    state.lock()  # no cloud writes to it meanwhile
    try:
        opened = Source(path)
        try:
            name = f"{state.cloud_id} {path}"
            copied = uvloop.run(copy_database(opened, name, url, lambda said: click.echo(said, err=True)))
        finally:
            opened.close()
    finally:
        state.unlock()
    rows = sum(one.rows for one in copied)
    click.echo(f"copied and verified: {rows} rows in {len(copied)} tables, to {without_password(url)}")


@db.command("migrate")
@_config
def db_migrate(config: Path | None) -> None:
    """Bring the PostgreSQL database of the settings to this version's schema. Processes that start do so themselves."""
    number, url = uvloop.run(_schema(load(config)))
    click.echo(f"schema {number}: {url}")


async def _schema(settings: Settings) -> tuple[int, str]:
    store = open_store(settings, application="instar db")
    await store.open()
    try:
        rows = await store.read("SELECT MAX(number) AS number FROM migrations")
    finally:
        await store.close()
    return rows[0]["number"], without_password(settings.database)
