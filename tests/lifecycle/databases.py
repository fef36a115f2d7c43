"""Where the simulated clouds of these tests have their databases: SQLite in their directories, or a private PostgreSQL; and
their bus: in their process, or a private RabbitMQ.

`INSTAR_TEST_DATABASE=postgresql INSTAR_TEST_BUS=rabbitmq pytest tests/lifecycle` runs them all there; SERVER, and likewise
those of rabbitmq_server.py, are what processes of a test hand on.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import asyncpg
import msgspec

from instar.config import Settings
from tests.patience import slowness
from tests.postgresql_server import PATIENT, SERVER
from tests.rabbitmq_server import bus_of, ensure_bus, on_rabbitmq

LATE_MAX = 5.0


def on_postgresql() -> bool:
    return SERVER in os.environ


def settings_of(directory: Path, settings: Settings) -> Settings:
    """With the database and the bus of the cloud that lies in the directory. Servers that share a busy machine with their
    clients answer late: no lease ends, and nobody is gone, for that alone."""
    if not on_postgresql() and not on_rabbitmq():
        return settings
    late = min(LATE_MAX, slowness())
    engine, host = settings.engine, settings.host
    settings = msgspec.structs.replace(
        settings,
        bus=bus_of(directory),
        engine=msgspec.structs.replace(
            engine, lease_s=engine.lease_s * late, step_deadline_s=engine.step_deadline_s * late
        ),
        host=msgspec.structs.replace(
            host, down_after_s=host.down_after_s * late, lost_after_s=host.lost_after_s * late
        ),
    )
    if not on_postgresql():
        return settings
    return msgspec.structs.replace(
        settings, database=f"{os.environ[SERVER]}/{_name(directory)}", postgresql=PATIENT
    )


async def database_made(directory: Path, template: Path | None = None) -> None:
    """The directory's cloud has its database: a copy of that of `template`, or an empty one where there is none yet. And
    its place on the bus, which is empty."""
    await asyncio.to_thread(ensure_bus, directory)
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
