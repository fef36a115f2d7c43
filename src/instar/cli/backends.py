"""Which database and which bus the settings mean. The only place that knows; called where processes are put together."""

from __future__ import annotations

import socket

from instar.bus.contract import Bus
from instar.bus.opening import bus_of
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.errors import StartupError
from instar.store.contract import Statement, Store
from instar.store.postgresql import PostgresqlStore
from instar.store.sqlite import SqliteStore


def open_store(settings: Settings, *, application: str) -> Store:
    """The shared database of a cloud of many processes, not opened yet. `application`: which of them asks, as the database
    shows it. Raises StartupError where the settings name none."""
    if not settings.database:
        raise StartupError("The setting `database` must name a PostgreSQL database that all processes of the cloud share.")
    return PostgresqlStore(settings.database, settings.postgresql, application=application)


def embedded_store(state: StateDir, settings: Settings) -> Store:
    """The database of a cloud that is one process: SQLite in its directory, or the PostgreSQL that the settings name."""
    if settings.database:
        return open_store(settings, application="instar up")
    return SqliteStore(state.database, durable=settings.store.durable)


async def claim_database(store: Store, cloud_id: str) -> None:
    """Of a cloud that is one process the lock on its directory keeps a second one away; a database that is elsewhere must
    therefore belong to one directory. Raises StartupError where it is another's."""
    claim = "INSERT INTO cloud_facts (name, value) VALUES ('directory', :id) ON CONFLICT (name) DO NOTHING"
    await store.write(Statement(claim, {"id": cloud_id}))
    rows = await store.read("SELECT value FROM cloud_facts WHERE name = 'directory'")
    if rows[0]["value"] != cloud_id:
        raise StartupError(
            f"The database belongs to the cloud {rows[0]['value']}, whose directory is another one than this ({cloud_id})."
        )


def embedded_bus(settings: Settings) -> Bus:
    """In this process, or a broker. Simulated hosts are many: they have one queue in common there."""
    return bus_of(settings, agent=socket.gethostname() if settings.hypervisor == "simulated" else "")
