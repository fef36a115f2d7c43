"""Which database and which bus the settings mean. The only place that knows; called where processes are put together."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import structlog

from instar.bus.contract import Bus
from instar.bus.memory import MemoryBus
from instar.bus.metered import MeteredBus
from instar.bus.socket import SocketBus
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.errors import StartupError, Unavailable
from instar.store.contract import Statement, Store
from instar.store.metered import MeteredStore
from instar.store.sqlite import SqliteStore

log = structlog.get_logger()

RETRY_FIRST_S, RETRY_MAX_S = 0.2, 5.0
AWAY = (Unavailable, OSError, TimeoutError)


def open_store(settings: Settings, *, application: str, migrates: bool = True) -> Store:
    """The shared database of a cloud of many processes, not opened yet. `application`: which of them asks, as the database
    shows it; `migrates`: it brings the schema forward. Raises StartupError where the settings name none."""
    if not settings.database:
        raise StartupError("The setting `database` must name a PostgreSQL database that all processes of the cloud share.")
    from instar.store.postgresql import PostgresqlStore  # clouds without it start sooner: drivers are loaded when needed

    postgresql = PostgresqlStore(settings.database, settings.postgresql, application=application, migrates=migrates)
    return MeteredStore(postgresql)


def embedded_store(state: StateDir, settings: Settings) -> Store:
    """The database of a cloud that is one process: SQLite in its directory, or the PostgreSQL that the settings name."""
    if settings.database:
        return open_store(settings, application="instar up")
    return MeteredStore(SqliteStore(state.database, durable=settings.store.durable))


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
    if not settings.bus:
        return MeteredBus(MemoryBus())
    many = socket.gethostname() if settings.hypervisor == "simulated" else ""
    return server_bus(settings, name="instar up", agent=many)


def server_bus(settings: Settings, *, name: str, agent: str = "") -> Bus:
    """The broker of a cloud of many processes, not connected yet. `name` is what it shows for the process; `agent` is that
    of an agent of many hosts, the same at each start. Raises StartupError where the settings name none."""
    if not settings.bus:
        raise StartupError("The setting `bus` must name the RabbitMQ broker that all processes of the cloud share.")
    from instar.bus.opening import bus_of  # see above

    return MeteredBus(bus_of(settings, name=name, agent=agent))


def agent_bus(state: StateDir, settings: Settings, *, name: str, many: str = "") -> Bus:
    """The bus of an agent: the settings' one, else that of `instar up` on this machine. `many`: see `server_bus.agent`."""
    return server_bus(settings, name=name, agent=many) if settings.bus else MeteredBus(SocketBus(state.bus_socket))


async def open_patiently(opening: Callable[[], Awaitable[None]], what: str) -> None:
    """Open what may be away for now, again and again with growing pauses. Raises StartupError for what waiting does not
    help against. Cancel it to give up."""
    pause_s = RETRY_FIRST_S
    while True:
        try:
            return await opening()
        except AWAY as error:
            log.warning("start.waits", what=what, reason=str(error) or type(error).__name__)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, RETRY_MAX_S)
