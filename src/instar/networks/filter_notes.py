"""Changes that hosts are to be told of, in a cloud of several processes: noted in the database, told by one of them.

Any process changes networks; `FilterNotes` writes down what that means for others in the same transaction, where it can be
known by then, or right after it. One process, the keeper, reads the notes (`FilterKeeper`), tells the hosts, and forgets
them then. So nothing is lost when either dies, and a host never hears an older definition after a newer one, as it could
from two processes that tell it at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable

import structlog

from instar.bus.contract import Bus, Message, Subscription
from instar.errors import InstarError
from instar.model.commands import PORTS_CHANGED
from instar.networks.filter_refresh import GATHER_S, REST_FACTOR, REST_MAX_S, affected
from instar.store.contract import Statement, Store
from instar.store.filter_changes import (
    FRESH,
    INSTANCES,
    LATE,
    MEMBERS,
    NETWORKS,
    RULES,
    Notes,
    filter_change_insert,
    filter_change_of_ports,
    filter_changes_fetch,
    filter_changes_forget,
)

log = structlog.get_logger()

TellHosts = Callable[[set[str]], Awaitable[set[str]]]

SPACING_S = 0.3  # between two words of notes, where changes come all the time
AGAIN_S = 1.0  # after a database or bus that was away
LOOK_EVERY_S = 2.0  # for notes of which no word came
LATE_EVERY_S = 5.0
CLOSE_MAX_S = 2.0


class FilterNotes:
    """Implements `FilterChanges`. Word of notes goes over the bus; none is no loss, see LOOK_EVERY_S."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self._store, self._bus = store, bus
        self._pending: dict[str, set[str]] = {}
        self._nudge = False
        self._told_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def noting(
        self, *, rules: Iterable[str] = (), members: Iterable[str] = (), instances: Iterable[str] = ()
    ) -> list[Statement]:
        return [
            *filter_change_insert(RULES, rules),
            *filter_change_insert(MEMBERS, members),
            *filter_change_insert(INSTANCES, instances),
        ]

    def noting_leavers(self, instance_id: str, port_id: str | None = None) -> list[Statement]:
        where = "p.device_id = :instance_id AND p.position IS NOT NULL AND p.made_by_us = 1"
        if port_id is None:
            return [filter_change_of_ports(where, {"instance_id": instance_id})]
        return [filter_change_of_ports(f"{where} AND p.id = :port_id", {"instance_id": instance_id, "port_id": port_id})]

    def rules_changed(self, group_ids: Iterable[str], *, noted: bool = False) -> None:
        self._changed(RULES, group_ids, noted)

    def members_changed(self, group_ids: Iterable[str], *, noted: bool = False) -> None:
        self._changed(MEMBERS, group_ids, noted)

    def instances_changed(self, instance_ids: Iterable[str], *, noted: bool = False) -> None:
        self._changed(INSTANCES, instance_ids, noted)

    def hosts_changed(self, network_ids: Iterable[str]) -> None:
        self._changed(NETWORKS, network_ids, False)

    def _changed(self, kind: str, ids: Iterable[str], noted: bool) -> None:
        subjects = set(ids)
        if not subjects:
            return
        if not noted:
            self._pending.setdefault(kind, set()).update(subjects)
        self._nudge = True
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="filter-notes")

    async def settled(self) -> None:
        while self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """What is not written down yet is, if that can be done in a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_MAX_S):
                await self.settled()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        try:
            while self._nudge:
                await asyncio.sleep(max(GATHER_S, self._told_at + SPACING_S - time.monotonic()))
                self._nudge = False
                pending, self._pending = self._pending, {}
                try:
                    await self._write(pending)
                except Exception as error:
                    log.warning("networks.notes_later", error=repr(error), retry_s=AGAIN_S)
                    for kind, subjects in pending.items():
                        self._pending.setdefault(kind, set()).update(subjects)
                    self._nudge = True
                    await asyncio.sleep(AGAIN_S)
        finally:
            self._task = None

    async def _write(self, pending: dict[str, set[str]]) -> None:
        statements = [one for kind, subjects in pending.items() for one in filter_change_insert(kind, subjects)]
        if statements:
            await self._store.write(*statements)
        pending.clear()
        self._told_at = time.monotonic()
        async with asyncio.timeout(AGAIN_S):
            await self._bus.publish(PORTS_CHANGED, Message("PortsChanged", b""))


class FilterKeeper:
    """Tells hosts what is noted; in one process at a time. `tell` gets ids of instances and returns those that it could
    not tell of: they are busy, or their host is away. These come again until they can be told of, or are gone."""

    def __init__(self, store: Store, bus: Bus, tell: TellHosts) -> None:
        self._store, self._bus, self._tell = store, bus, tell
        self._noted = asyncio.Event()
        self._told_beside: set[str] = set()  # instances of fresh notes that were told of while late ones were
        self._hearing: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        self._hearing = await self._bus.subscribe(PORTS_CHANGED, self._on_noted)
        self._noted.set()
        self._tasks = [
            asyncio.create_task(self._follow(), name="filter-keeper"),
            asyncio.create_task(self._follow_late(), name="filter-keeper late"),
        ]

    async def close(self) -> None:
        if self._hearing is not None:
            await self._hearing.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _on_noted(self, _message: Message) -> None:
        self._noted.set()

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._noted.wait()
            self._noted.clear()
            began = time.monotonic()
            try:
                while (notes := await filter_changes_fetch(self._store, FRESH)).ids:
                    await self._tell_of(notes)
                    took = time.monotonic() - began
                    await asyncio.sleep(min(max(GATHER_S, took * REST_FACTOR), REST_MAX_S))
                    began = time.monotonic()
            except (InstarError, TimeoutError) as error:
                log.warning("networks.tell_later", error=repr(error), retry_s=AGAIN_S)
                await asyncio.sleep(AGAIN_S)
            except Exception:
                log.exception("networks.tell_later")
                await asyncio.sleep(AGAIN_S)

    async def _tell_of(self, notes: Notes) -> None:
        subjects = notes.subjects
        instances = await affected(
            self._store, rules=subjects.get(RULES, set()), members=subjects.get(MEMBERS, set()),
            instances=subjects.get(INSTANCES, set()), networks=subjects.get(NETWORKS, set()),
        )  # fmt: skip
        self._told_beside |= instances
        late = await self._tell(instances) if instances else set()
        await self._store.write(filter_changes_forget(notes.ids), *filter_change_insert(LATE, late))

    async def _follow_late(self) -> None:
        """Apart from the rest: a host that does not answer must not hold up the others."""
        while True:
            await asyncio.sleep(LATE_EVERY_S)
            try:
                notes = await filter_changes_fetch(self._store, [LATE])
                if notes.ids:
                    await self._tell_late(notes)
            except (InstarError, TimeoutError) as error:
                log.warning("networks.tell_later", error=repr(error), retry_s=LATE_EVERY_S)
            except Exception:
                log.exception("networks.tell_later")

    async def _tell_late(self, notes: Notes) -> None:
        self._told_beside.clear()
        instances = notes.subjects[LATE]
        late = await self._tell(instances)
        # Of these it is not known which definition came last.
        again = instances & self._told_beside
        await self._store.write(
            filter_changes_forget(notes.ids), *filter_change_insert(LATE, late), *filter_change_insert(INSTANCES, again)
        )
        if again:
            self._noted.set()
