"""One simulated host without its interface: what stands on it, and how guests start, stop and tell of it.

Used by the driver, which obeys commands, and by the faults, through which things happen by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

import msgspec

from instar.hypervisor.simulated.records import (
    Change,
    ConsoleWritten,
    DirectoryGone,
    DiskMade,
    GuestGone,
    GuestSet,
    HostNoted,
    ImageCached,
    PortsSet,
    SimulatedGuest,
    SimulatedPort,
)
from instar.model.guest import GuestEvent, GuestState
from instar.model.states import PowerState

CONSOLE_MAX_BYTES = 65_536  # of one instance; older output is dropped
CACHED_IMAGES_MAX = 1000
ABSENT = GuestState(False)


class InstanceDirectory:
    """What an instance has on the host's file system: disks by role (size in bytes), boot counter, console log.

    `written` counts all bytes that the log ever got."""

    __slots__ = ("boots", "console", "disks", "written")

    def __init__(self) -> None:
        self.disks: dict[str, int] = {}
        self.boots = 0
        self.console = bytearray()
        self.written = 0


class Machine:
    """State of one host. `record` keeps changes; each public method is one atomic change of the host."""

    __slots__ = (
        "_missed", "_record", "_waiting", "away", "directories", "guests", "images", "last_domain_id", "name",
        "on_event", "ports",
    )  # fmt: skip

    def __init__(self, name: str, record: Callable[[tuple[Change, ...]], None]) -> None:
        self.name = name
        self.guests: dict[str, SimulatedGuest] = {}
        self.directories: dict[str, InstanceDirectory] = {}
        self.ports: dict[str, tuple[SimulatedPort, ...]] = {}
        self.images: dict[str, None] = {}  # the least recently used first
        self.last_domain_id = 0
        self.on_event: Callable[[GuestEvent], None] | None = None
        self.away = False  # the hypervisor's daemon; guests go on without it
        self._missed: dict[str, None] = {}  # instances that changed while it was away, oldest first
        self._record = record
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def state_of(self, instance_id: str) -> GuestState:
        guest = self.guests.get(instance_id)
        return guest.state() if guest else ABSENT

    def use_image(self, sha256: str) -> None:
        """It is in the cache, and will be the last to go from there."""
        del self.images[sha256]
        self.images[sha256] = None

    # --- changes --------------------------------------------------------------------------------------------------

    def change(self, *changes: Change) -> None:
        """Make the changes true, and keep them."""
        self._record(changes)
        for change in changes:
            self.apply(change)

    def apply(self, change: Change) -> None:  # one branch for each kind of change
        match change:
            case GuestSet(guest=guest):
                self.guests[guest.instance_id] = guest
                self.last_domain_id = max(self.last_domain_id, guest.domain_id or 0)
            case ConsoleWritten(instance_id=instance_id, text=text, boots=boots):
                directory = self._directory(instance_id)
                directory.boots = boots
                directory.console += text
                directory.written += len(text)
                del directory.console[:-CONSOLE_MAX_BYTES]
            case DiskMade(instance_id=instance_id, name=name, size_bytes=size_bytes):
                self._directory(instance_id).disks[name] = size_bytes
            case PortsSet(instance_id=instance_id, ports=ports):
                if ports:
                    self.ports[instance_id] = ports
                else:
                    self.ports.pop(instance_id, None)
            case GuestGone(instance_id=instance_id):
                self.guests.pop(instance_id, None)
            case DirectoryGone(instance_id=instance_id):
                self.directories.pop(instance_id, None)
            case ImageCached(sha256=sha256):
                self.images[sha256] = None
                # A simulated disk needs no base image once it is made, so nobody has to be asked.
                if len(self.images) > CACHED_IMAGES_MAX:
                    del self.images[next(iter(self.images))]
            case HostNoted(last_domain_id=last_domain_id):
                self.last_domain_id = max(self.last_domain_id, last_domain_id)

    def changes(self) -> Iterator[Change]:
        """The fewest changes that make this state."""
        if self.last_domain_id:
            yield HostNoted(self.name, self.last_domain_id)
        for guest in self.guests.values():
            yield GuestSet(self.name, guest)
        for instance_id, directory in self.directories.items():
            for name, size_bytes in directory.disks.items():
                yield DiskMade(self.name, instance_id, name, size_bytes)
            yield ConsoleWritten(self.name, instance_id, bytes(directory.console), directory.boots)
        for instance_id, ports in self.ports.items():
            yield PortsSet(self.name, instance_id, ports)
        for sha256 in self.images:
            yield ImageCached(self.name, sha256)

    def _directory(self, instance_id: str) -> InstanceDirectory:
        directory = self.directories.get(instance_id)
        if directory is None:
            directory = self.directories[instance_id] = InstanceDirectory()
        return directory

    # --- guests ---------------------------------------------------------------------------------------------------

    def start(self, guest: SimulatedGuest) -> GuestState:
        """The guest runs under a new domain id and has booted: its counter went up, its console shows it."""
        running = msgspec.structs.replace(
            guest, power_state=PowerState.RUNNING, domain_id=self.last_domain_id + 1
        )
        directory = self.directories.get(guest.instance_id)
        boots = (directory.boots if directory else 0) + 1
        console = ConsoleWritten(self.name, guest.instance_id, _boot_text(running, boots), boots)
        self.change(GuestSet(self.name, running), console)
        return self._tell(guest.instance_id, "started")

    def stop(self, instance_id: str, event: str, power_state: PowerState = PowerState.SHUTDOWN) -> GuestState:
        """The guest does not run; `event` says why (shutdown: by itself, stopped: destroyed, crashed)."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.domain_id is None:
            return self.state_of(instance_id)
        stopped = msgspec.structs.replace(guest, power_state=power_state, domain_id=None)
        self.change(GuestSet(self.name, stopped))
        return self._tell(instance_id, event)

    def set_paused(self, instance_id: str, paused: bool) -> GuestState:
        """A guest that runs is paused, or goes on."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.domain_id is None:
            return self.state_of(instance_id)
        power_state = PowerState.PAUSED if paused else PowerState.RUNNING
        self.change(GuestSet(self.name, msgspec.structs.replace(guest, power_state=power_state)))
        return self._tell(instance_id, "paused" if paused else "resumed")

    def remove(self, instance_id: str) -> None:
        """The guest is neither running nor defined; its directory and ports stay."""
        if instance_id not in self.guests:
            return
        self.stop(instance_id, "stopped")
        self.change(GuestGone(self.name, instance_id))
        self._tell(instance_id, "removed")

    def press_power_button(self, instance_id: str, domain_id: int, *, reboots: bool) -> None:
        """What a guest does that obeys ACPI; nothing when it is paused or no longer the one that was pressed."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.domain_id != domain_id or guest.power_state is not PowerState.RUNNING:
            return
        self.stop(instance_id, "shutdown")
        if reboots:
            self.start(guest)

    # --- telling --------------------------------------------------------------------------------------------------

    async def wait_for_change(self, instance_id: str, timeout_s: float) -> bool:
        """Wait for the guest's next event, or for the daemon to go away. False when neither was within `timeout_s`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(instance_id, [])
        waiting.append(future)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            return False
        finally:
            waiting.remove(future)
            if not waiting and self._waiting.get(instance_id) is waiting:
                del self._waiting[instance_id]
        return True

    def set_away(self, away: bool) -> None:
        """The daemon goes away, and whoever waits for a guest wakes; or it is back, and tells what it missed."""
        self.away = away
        if away:
            for futures in self._waiting.values():
                _wake(futures)
            return
        missed, self._missed = self._missed, {}
        for instance_id in missed:
            state = self.state_of(instance_id)
            event = "stopped" if state.exists else "removed"
            if state.domain_id is not None:
                event = "paused" if state.power_state is PowerState.PAUSED else "started"
            self._tell(instance_id, event)

    def _tell(self, instance_id: str, event: str) -> GuestState:
        state = self.state_of(instance_id)
        if self.away:
            self._missed[instance_id] = None
            return state
        _wake(self._waiting.get(instance_id, ()))
        if self.on_event is not None:
            # Later, as a real hypervisor's events come: never inside of the call that caused them.
            asyncio.get_running_loop().call_soon(self.on_event, GuestEvent(instance_id, event, state))
        return state


def _wake(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _boot_text(guest: SimulatedGuest, boots: int) -> bytes:
    lines = [f"INSTAR-BOOT count={boots} uuid={guest.instance_id} hostname={guest.hostname}"]
    for number, port in enumerate(guest.ports):
        lines += [f"INSTAR-NET eth{number} address={address} mac={port.mac_address}" for address in port.addresses]
    return ("\n".join(lines) + "\n").encode()
