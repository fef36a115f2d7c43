"""Simulated hosts get a zone of their own, where a cloud has real ones too: no guest that is meant to run lands on them."""

from __future__ import annotations

import asyncio
import time
import uuid

from instar.cli.backends import open_store
from instar.cli.distributed.layout import SIMULATED_ZONE
from instar.clock import now_us
from instar.config import Settings
from instar.errors import StartupError
from instar.store.aggregates import aggregate_add_host, aggregate_create, aggregate_list
from instar.store.contract import Statement, Store
from instar.store.hosts import host_list

KNOWN_MAX_S = 30.0
POLL_S = 0.1


async def ensure_zone_of_simulated(settings: Settings, names: list[str]) -> None:
    """The hosts of these names are in the aggregate and zone `simulated`. Raises StartupError: they never reported."""
    store = open_store(settings, application="instar distributed up", migrates=False)
    await store.open()
    try:
        await _ensure(store, names)
    finally:
        await store.close()


async def _ensure(store: Store, names: list[str]) -> None:
    found = next((one for one in await aggregate_list(store) if one.name == SIMULATED_ZONE), None)
    if found is None:
        found = await aggregate_create(
            store, uuid=str(uuid.uuid4()), name=SIMULATED_ZONE, zone=SIMULATED_ZONE, now_us=now_us()
        )
    missing = sorted(set(names) - set(found.hosts))
    if not missing:
        return
    await _until_known(store, set(missing))
    statements: list[Statement] = []
    for name in missing:
        statements += aggregate_add_host(found.id, name, now_us())
    await store.write(*statements)


async def _until_known(store: Store, names: set[str]) -> None:
    """Their first reports are written a moment after they came."""
    deadline = time.monotonic() + KNOWN_MAX_S
    while True:
        if names <= {row["name"] for row in await host_list(store)}:
            return
        if time.monotonic() > deadline:
            raise StartupError(f"Simulated hosts did not report within {KNOWN_MAX_S:g} seconds.")
        await asyncio.sleep(POLL_S)
