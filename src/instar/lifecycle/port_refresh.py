"""Hosts get fresh definitions of ports whose rules, addresses or members changed. Told by the network service.

A cloud in one process calls `refresh`; where there are several, the one that keeps filters calls `refresh_or_late`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import structlog

from instar.engine.hosts import HostClient
from instar.errors import InstarError
from instar.lifecycle.cloud import Cloud
from instar.model.network import InstancePort
from instar.store.instances import instance_places

log = structlog.get_logger()

BUSY_RETRY_S = 1.0
HOST_DEADLINE_S = 20.0
AT_ONCE = 16  # instances
BATCH = 500  # instances whose packet filters are refreshed from one read


class PortRefresh:
    """`refresh` may be called at any time; what it could not do for a busy instance is done later, while it is open."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._due: set[str] = set()  # instances that were busy when their ports changed
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._refresh_busy(), name="refresh ports")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self, instance_ids: set[str]) -> None:
        """Rules, addresses or members of these instances' ports changed: their hosts get the new definitions.

        Many at once: members of one group come together, and what they share is read and resolved once."""
        busy, _ = await self._refresh(instance_ids)
        self._due |= busy

    async def refresh_or_late(self, instance_ids: set[str]) -> set[str]:
        """The same; returns those that are busy or whose host is away: whoever calls remembers them."""
        busy, away = await self._refresh(instance_ids)
        return busy | away

    async def _refresh(self, instance_ids: set[str]) -> tuple[set[str], set[str]]:
        all_busy: set[str] = set()
        away: set[str] = set()
        for some in batched(sorted(instance_ids), BATCH):
            places = await instance_places(self._cloud.store, some)
            ports = await self._cloud.networks.ports_of_instances(some)
            turns = asyncio.Semaphore(AT_ONCE)
            refreshed = []
            for instance_id, (host, epoch, busy) in places.items():
                # Under the epoch of an operation in flight this could come after its last command, and bring back to the
                # host what it had removed. Under that of the one before, the host refuses what comes late.
                if busy:
                    all_busy.add(instance_id)
                elif instance_id in ports:
                    refreshed.append(self._refresh_one(turns, instance_id, host, epoch, ports[instance_id]))
            away.update(one for one in await asyncio.gather(*refreshed) if one)
        return all_busy, away

    async def _refresh_busy(self) -> None:
        while True:
            await asyncio.sleep(BUSY_RETRY_S)
            due, self._due = self._due, set()
            try:
                await self.refresh(due)
            except Exception:
                log.exception("ports.not_refreshed")
                self._due |= due

    async def _refresh_one(
        self, turns: asyncio.Semaphore, instance_id: str, host: str, epoch: int, ports: tuple[InstancePort, ...]
    ) -> str:
        """The id again, where the host could not be told."""
        if self._cloud.scheduler.is_silent(host):  # its guests would take all turns, for as long as no answer takes
            return instance_id
        client = HostClient(self._cloud.bus, instance_id=instance_id, epoch=epoch, deadline_s=HOST_DEADLINE_S)
        try:
            async with turns:
                await client.ensure_ports(host, tuple(port.definition for port in ports))
        except InstarError as error:  # the host gets them with the next operation, or when it comes back
            log.warning("ports.not_refreshed", instance=instance_id, reason=error.message)
            return instance_id
        return ""


def batched(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Parts of at most `size`."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
