"""Simulated hosts get a zone of their own, where a cloud has real ones too: no guest that is meant to run lands on them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from instar.cli.backends import open_store
from instar.cli.distributed.layout import SIMULATED_ZONE
from instar.clock import now_us
from instar.config import Settings
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.scheduling.host_view import capacity_of
from instar.store.aggregates import aggregate_add_host, aggregate_create, aggregate_list
from instar.store.contract import Statement, Store
from instar.store.hosts import host_list, host_report


async def ensure_zone_of_simulated(settings: Settings, names: list[str]) -> None:
    """The hosts of these names are in the aggregate and zone `simulated`, before any conductor could put a guest on them:
    so hosts that never reported are made known here, as their agent will report them. Raises StartupError."""
    store = open_store(settings, application="instar distributed up", migrates=False)
    await store.open()
    try:
        known = {row["name"] for row in await host_list(store)}
        await _make_known(store, settings, [name for name in names if name not in known])
        await _put_into_zone(store, names)
    finally:
        await store.close()


async def _make_known(store: Store, settings: Settings, names: Iterable[str]) -> None:
    world = SimulatedWorld(None, settings.simulated)
    statements: list[Statement] = []
    for name in names:
        inventory = await world.host(name).inventory()
        capacity = capacity_of(inventory, settings.host, settings.scheduling)
        statements.append(host_report(name, inventory, capacity, now_us()))
    if statements:
        await store.write(*statements)


async def _put_into_zone(store: Store, names: list[str]) -> None:
    found = next((one for one in await aggregate_list(store) if one.name == SIMULATED_ZONE), None)
    if found is None:
        found = await aggregate_create(
            store, uuid=str(uuid.uuid4()), name=SIMULATED_ZONE, zone=SIMULATED_ZONE, now_us=now_us()
        )
    statements: list[Statement] = []
    for name in sorted(set(names) - set(found.hosts)):
        statements += aggregate_add_host(found.id, name, now_us())
    if statements:
        await store.write(*statements)
