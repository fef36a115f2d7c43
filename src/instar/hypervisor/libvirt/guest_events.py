"""From libvirt's lifecycle events to ours, and the means to wait for one.

The connection hands events over on the loop; the driver's waits are woken at once, and one task reads the state again and
tells the agent. After a reconnect the states are compared with the last known ones: events of the time between are lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping

import libvirt
import structlog

from instar.errors import HypervisorUnavailable, OperationError
from instar.hypervisor.libvirt.domains import ABSENT
from instar.model.guest import GuestEvent, GuestState
from instar.model.states import PowerState

log = structlog.get_logger()

_NAMES: Mapping[int, str] = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "removed",
}
_STOPPED_BY_FAILURE = frozenset({libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED})


def event_name(event: int, detail: int) -> str | None:
    """Our word for libvirt's event; None for those that change nothing (a definition was written)."""
    if event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail in _STOPPED_BY_FAILURE:
        return "crashed"
    return _NAMES.get(event)


class GuestEvents:
    """The events of one host. `read` observes a guest, `is_ours` says whether an unknown domain is of this cloud."""

    def __init__(
        self,
        *,
        read: Callable[[str], Awaitable[GuestState]],
        is_ours: Callable[[str], Awaitable[bool]],
        waiting_max: int,
    ) -> None:
        self._read, self._is_ours = read, is_ours
        self._queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue(waiting_max)
        self._known: dict[str, GuestState] = {}
        self._watches: dict[str, set[asyncio.Event]] = {}
        self._teller: asyncio.Task[None] | None = None
        self._on_event: Callable[[GuestEvent], None] = lambda _event: None

    def open(self, on_event: Callable[[GuestEvent], None]) -> None:
        self._on_event = on_event
        self._teller = asyncio.create_task(self._tell(), name="guest-events")

    async def close(self) -> None:
        if self._teller is not None:
            self._teller.cancel()
            await asyncio.gather(self._teller, return_exceptions=True)
            self._teller = None

    def expect(self, instance_id: str) -> None:
        """The guest is ours; its events need no look at its metadata."""
        self._known.setdefault(instance_id, ABSENT)

    @contextlib.contextmanager
    def watch(self, instance_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the guest may have changed, and when the connection was lost. Begin to watch
        before reading the state, clear it before reading again."""
        changed = asyncio.Event()
        watches = self._watches.setdefault(instance_id, set())
        watches.add(changed)
        try:
            yield changed
        finally:
            watches.discard(changed)
            if not watches:
                self._watches.pop(instance_id, None)

    def wake(self, instance_id: str) -> None:
        """Something of the guest changed that is no event to tell. On the loop."""
        for changed in self._watches.get(instance_id, ()):
            changed.set()

    def wake_all(self) -> None:
        for watches in self._watches.values():
            for changed in watches:
                changed.set()

    def received(self, instance_id: str, event: int, detail: int) -> None:
        """libvirt told an event. On the loop."""
        self.wake(instance_id)
        name = event_name(event, detail)
        if name is not None:
            self._enqueue(instance_id, name)

    def compare(self, states: Mapping[str, GuestState]) -> None:
        """The states after a reconnect: what differs from the last known is told as if its event had come."""
        for instance_id, before in list(self._known.items()):
            now = states.get(instance_id, ABSENT)
            if now != before:
                self._enqueue(instance_id, _name_of_change(before, now))
        for instance_id, state in states.items():
            self._known.setdefault(instance_id, state)

    def _enqueue(self, instance_id: str, name: str) -> None:
        try:
            self._queue.put_nowait((instance_id, name))
        except asyncio.QueueFull:
            log.error("guest_events.dropped", instance=instance_id, event=name)  # power sync finds it later

    async def _tell(self) -> None:
        while True:
            instance_id, name = await self._queue.get()
            try:
                if instance_id not in self._known and not await self._is_ours(instance_id):
                    continue
                state = await self._read(instance_id)
            except HypervisorUnavailable:
                continue  # told by `compare` after the reconnect
            except OperationError as error:
                log.warning("guest_events.unreadable", instance=instance_id, reason=error.message)
                continue
            except Exception:  # whatever it is: without this task nobody hears of any guest again
                log.exception("guest_events.unreadable", instance=instance_id)
                continue
            if state.exists:
                self._known[instance_id] = state
            else:
                self._known.pop(instance_id, None)
            try:
                self._on_event(GuestEvent(instance_id=instance_id, event=name, state=state))
            except Exception:
                log.exception("guest_events.receiver_failed", instance=instance_id, event=name)


def _name_of_change(before: GuestState, now: GuestState) -> str:
    if not now.exists:
        return "removed"
    if now.domain_id is None:
        return "stopped"
    if now.power_state == PowerState.PAUSED:
        return "paused"
    return "resumed" if before.domain_id == now.domain_id else "started"
