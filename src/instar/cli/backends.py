"""Which database and which bus the settings mean. The only place that knows; called where processes are put together."""

from __future__ import annotations

from instar.bus.contract import Bus
from instar.bus.memory import MemoryBus
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.store.contract import Store
from instar.store.sqlite import SqliteStore


def embedded_store(state: StateDir, settings: Settings) -> Store:
    """The database of a cloud that is one process."""
    return SqliteStore(state.database, durable=settings.store.durable)


def embedded_bus() -> Bus:
    return MemoryBus()
