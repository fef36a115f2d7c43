"""Tells the hosts' side which instances need fresh definitions after groups, rules, members or hosts have changed.

A group of a thousand ports changes with each build of one more, and all the others' filters with it. So changes are
gathered, and after each telling there is a rest in proportion to the time that it took: under load filters are a moment
older, and the work stays a fraction of a core.

This is for a cloud that is one process. Where there are several, `filter_notes.py` has the same methods.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import structlog

from instar.errors import InstarError
from instar.store.contract import Statement, Store
from instar.store.network_reach import instances_to_tell
from instar.store.security_groups import instances_filtered_by

log = structlog.get_logger()

PortsChanged = Callable[[set[str]], Awaitable[None]]

GATHER_S = 0.05
REST_FACTOR = 9.0  # rest so many times as long as the last telling took
REST_MAX_S = 20.0
TELL_MAX_S = 60.0


async def affected(
    store: Store, *, rules: set[str], members: set[str], instances: set[str], networks: set[str]
) -> set[str]:
    """Instances whose definitions depend on any of these: rules or members of groups, instances, hosts of networks."""
    found = set(instances)
    if rules or members:
        found |= await instances_filtered_by(store, rules, members)
    if networks:
        found |= await instances_to_tell(store, networks)
    return found


class FilterChanges(Protocol):
    """What changes of networks are told to. `noted`: the statements of `noting` or `noting_leavers` were written with the
    change, so nothing is lost when this process dies right after."""

    def noting(
        self, *, rules: Iterable[str] = (), members: Iterable[str] = (), instances: Iterable[str] = ()
    ) -> list[Statement]: ...

    def noting_leavers(self, instance_id: str, port_id: str | None = None) -> list[Statement]:
        """The groups of ports that were made for the instance, and go in this transaction: before they do."""
        ...

    def rules_changed(self, group_ids: Iterable[str], *, noted: bool = False) -> None: ...
    def members_changed(self, group_ids: Iterable[str], *, noted: bool = False) -> None: ...
    def instances_changed(self, instance_ids: Iterable[str], *, noted: bool = False) -> None: ...

    def hosts_changed(self, network_ids: Iterable[str]) -> None:
        """Other hosts than before have these networks."""
        ...

    async def settled(self) -> None:
        """Returns when everything so far has been passed on."""
        ...

    async def close(self) -> None: ...


class FilterRefresh:
    """`tell` is called with the ids of instances whose definitions may differ from what their host has; one call at a
    time. What it raises is logged: the reconciler of the hosts compares again on its own timer."""

    def __init__(self, store: Store, tell: PortsChanged | None) -> None:
        self._store = store
        self._tell = tell
        self._rules: set[str] = set()
        self._members: set[str] = set()
        self._instances: set[str] = set()
        self._networks: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def noting(
        self, *, rules: Iterable[str] = (), members: Iterable[str] = (), instances: Iterable[str] = ()
    ) -> list[Statement]:
        return []

    def noting_leavers(self, instance_id: str, port_id: str | None = None) -> list[Statement]:
        return []

    def rules_changed(self, group_ids: Iterable[str], *, noted: bool = False) -> None:
        self._note(self._rules, group_ids)

    def members_changed(self, group_ids: Iterable[str], *, noted: bool = False) -> None:
        self._note(self._members, group_ids)

    def instances_changed(self, instance_ids: Iterable[str], *, noted: bool = False) -> None:
        self._note(self._instances, instance_ids)

    def hosts_changed(self, network_ids: Iterable[str]) -> None:
        self._note(self._networks, network_ids)

    def _note(self, into: set[str], ids: Iterable[str]) -> None:
        if self._tell is None:
            return
        into.update(ids)
        if into and self._task is None:
            self._task = asyncio.create_task(self._work(), name="filter-refresh")

    async def settled(self) -> None:
        while self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        try:
            await asyncio.sleep(GATHER_S)
            while self._waiting():
                began = time.monotonic()
                await self._once()
                if self._waiting():
                    took = time.monotonic() - began
                    await asyncio.sleep(min(max(GATHER_S, took * REST_FACTOR), REST_MAX_S))
        finally:
            self._task = None

    def _waiting(self) -> bool:
        return bool(self._rules or self._members or self._instances or self._networks)

    async def _once(self) -> None:
        rules, members, instances = self._rules, self._members, self._instances
        networks, self._networks = self._networks, set()
        self._rules, self._members, self._instances = set(), set(), set()
        assert self._tell is not None
        try:
            async with asyncio.timeout(TELL_MAX_S):
                instances = await affected(
                    self._store, rules=rules, members=members, instances=instances, networks=networks
                )
                if instances:
                    await self._tell(instances)
        except (InstarError, TimeoutError) as error:
            log.warning("networks.refresh_failed", instances=len(instances), error=repr(error))
        except Exception:
            log.exception("networks.refresh_failed", instances=len(instances))
