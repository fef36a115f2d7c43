"""Notifications: recorded in the transaction that they tell of, published from the outbox afterwards.

So none is lost by a crash; one may come twice, and carries a `message_id` to see it by.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from instar.bus.contract import Bus, BusAway, Message
from instar.clock import iso, now_us
from instar.errors import InstarError
from instar.model.instance import Instance, InstanceFacts
from instar.model.operation import Notification, Operation
from instar.model.states import VmState
from instar.store.contract import Store
from instar.store.operations import notifications_fetch, notifications_remove

log = structlog.get_logger()

TOPIC = "notifications."  # + instance.<action>.<phase>
BATCH_MAX = 200
RETRY_S = 1.0
LOOK_AGAIN_S = 30.0
LOOK_FOR_LEFT_S = 2.0
GATHER_S = 0.2  # what is recorded within this time is told together


def notification(
    instance: Instance,
    operation: Operation,
    phase: str,
    vm_state: VmState,
    facts: InstanceFacts,
    fault: InstarError | None,
) -> Notification:
    """`phase` is start, end or error. The id begins with the time, so the outbox is read in order."""
    flavor = instance.spec.flavor
    payload: dict[str, Any] = {
        "uuid": instance.id,
        "display_name": instance.name,
        "tenant_id": instance.project_id,
        "user_id": instance.user_id,
        "request_id": operation.request_id,
        "state": vm_state.value,
        "power_state": instance.power_state.name.lower(),
        "task_state": instance.task_state.value if phase == "start" and instance.task_state else None,
        "host": instance.host,
        "flavor": {"flavorid": flavor.id, "name": flavor.name, "vcpus": flavor.vcpus, "memory_mb": flavor.memory_mib},
        "image_uuid": (instance.spec.image.id or None) if instance.spec.image else None,
        "ip_addresses": [
            {"mac": port.definition.mac_address, "address": ip.ip_address, "port_uuid": port.definition.id}
            for port in facts.ports
            for ip in port.definition.fixed_ips
        ],
        "block_devices": [
            {
                "volume_id": volume.volume_id, "device_name": f"/dev/{volume.device}", "tag": volume.tag,
                "boot_index": volume.boot_index,
                "delete_on_termination": instance.spec.ends_volumes.get(volume.volume_id, volume.delete_on_termination),
            }
            for volume in facts.volumes
        ],
        "created_at": iso(instance.created_at),
        "launched_at": iso(instance.launched_at) if instance.launched_at else None,
        "terminated_at": iso(instance.terminated_at) if instance.terminated_at else None,
        "fault": {"exception": type(fault).__name__, "exception_message": fault.message} if fault else None,
    }
    time_us = now_us()
    return Notification(
        message_id=f"{time_us:016x}-{os.urandom(6).hex()}",
        event_type=f"instance.{operation.action}.{phase}",
        timestamp=time_us,
        payload=payload,
        publisher_id=f"conductor:{operation.owner}",
        priority="ERROR" if phase == "error" else "INFO",
    )


class Outbox:
    """Publishes what one conductor recorded (`owner` tells which it is now). `nudge` after a commit."""

    def __init__(
        self, store: Store, bus: Bus, owner: Callable[[], str | None], *, look_again_s: float = LOOK_AGAIN_S
    ) -> None:
        self._store = store
        self._bus = bus
        self._owner = owner
        self._look_again_s = look_again_s
        self._waiting = asyncio.Event()

    def nudge(self) -> None:
        self._waiting.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._waiting.clear()
            try:
                while await self._publish_some():
                    pass
            except BusAway:
                await asyncio.sleep(RETRY_S)  # the bus itself says that it is away
                self._waiting.set()
            except Exception:
                log.exception("outbox.failed")
                await asyncio.sleep(RETRY_S)
            # Not wait_for: on Python 3.11 it may swallow a cancel that comes together with a nudge, and run for ever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_again_s):
                    await self._waiting.wait()
            await asyncio.sleep(GATHER_S)

    async def _publish_some(self) -> bool:
        found = await notifications_fetch(self._store, BATCH_MAX, self._owner())
        for _, body in found:
            told = msgspec.msgpack.decode(body, type=Notification)
            await self._bus.notify(TOPIC + told.event_type, Message("Notification", body))
        if found:
            await self._store.write(*notifications_remove([message_id for message_id, _ in found]))
        return len(found) == BATCH_MAX


class LeftOutbox:
    """For the keeper: publishes what conductors left that are gone."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self._outbox = Outbox(store, bus, lambda: None, look_again_s=LOOK_FOR_LEFT_S)
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._outbox.run(), name="outbox of those who are gone")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
