"""Where the simulated clouds of these tests have their databases: SQLite in their directories, or a private PostgreSQL.

`INSTAR_TEST_DATABASE=postgresql pytest tests/lifecycle` runs them all there; SERVER is what processes of a test hand on.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import asyncpg
import msgspec

from instar.config import Settings
from tests.postgresql_server import PATIENT

SERVER = "INSTAR_TEST_DATABASE_SERVER"  # postgresql://user:password@host:port


def on_postgresql() -> bool:
    return SERVER in os.environ


def settings_of(directory: Path, settings: Settings) -> Settings:
    """With the database of the cloud that lies in the directory."""
    if not on_postgresql():
        return settings
    return msgspec.structs.replace(
        settings, database=f"{os.environ[SERVER]}/{_name(directory)}", postgresql=PATIENT
    )


async def database_made(directory: Path, template: Path | None = None) -> None:
    """The directory's cloud has its database: a copy of that of `template`, or an empty one where there is none yet."""
    try:
        await _execute(f"CREATE DATABASE {_name(directory)} TEMPLATE {_name(template) if template else 'template0'}")
    except asyncpg.DuplicateDatabaseError:
        if template is not None:
            raise


async def database_renamed(directory: Path, template: Path) -> None:
    """What was the directory's database is the template's."""
    await _execute(f"ALTER DATABASE {_name(directory)} RENAME TO {_name(template)}")


async def _execute(sql: str) -> None:
    if not on_postgresql():
        return
    connection = await asyncpg.connect(f"{os.environ[SERVER]}/postgres")
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


def _name(directory: Path) -> str:
    return "d" + hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:24]
