"""Guests that QEMU holds still because a volume did not answer: they go on, and ask the volume again. The driver calls it.

A volume's process that dies is there again in a moment, but QEMU (as libvirt 9.0 starts it) does not wait for it: a request
of this moment fails. So QEMU is told to hold the guest still then, rather than to tell it of an error that its file system
would not get over. Nobody asked for that pause: outside of this host the guest counts as running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import libvirt
import structlog

from instar.errors import OperationError
from instar.hypervisor.libvirt import domains
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.host_paths import HostPaths

log = structlog.get_logger()

FIRST_S, MAX_S = 0.1, 5.0  # between two attempts


class IoErrors:
    """Of the guests of one cloud: a libvirtd of the machine's own tells of all domains, of others', too."""

    def __init__(self, connection: LibvirtConnection, paths: HostPaths) -> None:
        self._connection, self._paths = connection, paths
        self._waiting: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        for task in self._waiting.values():
            task.cancel()
        await asyncio.gather(*self._waiting.values(), return_exceptions=True)

    def noticed(self, instance_id: str) -> None:
        """The guest, or somebody else's, is held still. On the loop."""
        if instance_id not in self._waiting:
            task = asyncio.create_task(self._go_on(instance_id), name=f"io error {instance_id}")
            self._waiting[instance_id] = task
            task.add_done_callback(lambda _: self._waiting.pop(instance_id, None))

    async def look(self, instance_ids: Iterable[str]) -> None:
        """Those among them that were held still while nobody listened."""
        wanted = tuple(instance_ids)
        for instance_id in await self._connection.run(lambda connection: _held(connection, wanted)):
            self.noticed(instance_id)

    async def _go_on(self, instance_id: str) -> None:
        """Until it is held still no more."""
        pause_s, paths = FIRST_S, self._paths
        log.warning("guest.io_error", instance=instance_id)
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_S)
            try:
                if not await self._connection.run(lambda connection: _resumed(connection, instance_id, paths)):
                    return
            except OperationError as error:
                log.info("guest.not_resumed", instance=instance_id, reason=error.message)


def _resumed(connection: Any, instance_id: str, paths: HostPaths) -> bool:
    """False where nothing is to be done (any more). Blocking."""
    domain = domains.find(connection, instance_id)
    if domain is None or not domains.is_held_by_error(domain):
        return False
    if not paths.instance(instance_id).is_dir() and not domains.is_ours(domain, paths.cloud_id):
        return False  # whoever it belongs to may have made it stop on purpose, for want of room for example
    domain.resume()
    return True


def _held(connection: Any, instance_ids: tuple[str, ...]) -> list[str]:
    """Blocking."""
    found = [(instance_id, domains.find(connection, instance_id)) for instance_id in instance_ids]
    return [instance_id for instance_id, domain in found if domain is not None and domains.is_held_by_error(domain)]


def is_io_error(event: int, detail: int) -> bool:
    """Whether libvirt's event says that QEMU holds a guest still."""
    return (event, detail) == (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR)
