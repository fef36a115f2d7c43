"""One simulated host without its interface: what stands on it, and how guests start, stop and tell of it.

Used by the driver, which obeys commands, and by the faults, through which things happen by themselves.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from instar.clock import now_us
from instar.hypervisor.simulated.contents import SharedContents
from instar.hypervisor.simulated.records import (
    AsideGone,
    Change,
    ConsoleWritten,
    DirectoryBroughtBack,
    DirectoryGone,
    DirectorySetAside,
    DiskGone,
    DiskMade,
    DiskSet,
    GuestGone,
    GuestSet,
    HostNoted,
    ImageCached,
    PortsSet,
    SimulatedContent,
    SimulatedDisk,
    SimulatedGuest,
    SimulatedPort,
    VolumeWritten,
    simulated_port,
)
from instar.model.guest import GuestEvent, GuestState
from instar.model.network import PortDefinition
from instar.model.states import PowerState

CONSOLE_MAX_BYTES = 65_536  # of one instance; older output is dropped
CACHED_IMAGES_MAX = 1000
ABSENT = GuestState(False)


class InstanceDirectory:
    """What an instance has on the host's file system: disks by role, console log.

    `written` counts all bytes that the log ever got."""

    __slots__ = ("console", "disks", "written")

    def __init__(self) -> None:
        self.disks: dict[str, SimulatedDisk] = {}
        self.console = bytearray()
        self.written = 0


class Machine:
    """State of one host. `record` keeps changes; each public method is one atomic change of the host."""

    __slots__ = (
        "_missed", "_record", "_waiting", "aside", "away", "contents", "cut_off", "directories", "guests", "images",
        "last_domain_id", "name", "on_event", "ports",
    )  # fmt: skip

    def __init__(self, name: str, record: Callable[[tuple[Change, ...]], None], contents: SharedContents) -> None:
        self.name = name
        self.contents = contents
        self.guests: dict[str, SimulatedGuest] = {}
        self.directories: dict[str, InstanceDirectory] = {}
        self.aside: dict[str, InstanceDirectory] = {}
        self.ports: dict[str, tuple[SimulatedPort, ...]] = {}
        self.images: dict[str, None] = {}  # the least recently used first
        self.last_domain_id = 0
        self.on_event: Callable[[GuestEvent], None] | None = None
        self.away = False  # the hypervisor's daemon; guests go on without it
        self.cut_off = False  # no other host reaches it, and it reaches none
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

    def running(self, instance_id: str) -> SimulatedGuest | None:
        """The guest, where it runs or is paused."""
        guest = self.guests.get(instance_id)
        return guest if guest is not None and guest.domain_id is not None else None

    def disks_of(self, instance_id: str) -> dict[str, SimulatedDisk]:
        directory = self.directories.get(instance_id)
        return directory.disks if directory else {}

    # --- changes --------------------------------------------------------------------------------------------------

    def change(self, *changes: Change) -> None:
        """Make the changes true, and keep them."""
        self._record(changes)
        for change in changes:
            self.apply(change)

    def change_with(self, other: Machine, *changes: Change) -> None:
        """Changes of this machine and of another one, at one moment."""
        self._record(changes)
        for change in changes:
            (self if change.host == self.name else other).apply(change)

    def set_ports(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        """These are the ports of the instance that the host knows."""
        plugged = tuple(simulated_port(port) for port in ports)
        if plugged != self.ports.get(instance_id, ()):
            self.change(PortsSet(self.name, instance_id, plugged))

    def apply(self, change: Change) -> None:  # one branch for each kind of change
        match change:
            case GuestSet(guest=guest):
                self.guests[guest.instance_id] = guest
                self.last_domain_id = max(self.last_domain_id, guest.domain_id or 0)
            case ConsoleWritten(instance_id=instance_id, text=text, boots=boots):
                directory = self._directory(instance_id)
                directory.console += text
                directory.written += len(text)
                del directory.console[:-CONSOLE_MAX_BYTES]
                if boots and (root := directory.disks.get("root")):
                    directory.disks["root"] = msgspec.structs.replace(root, content=SimulatedContent(boots))
            case DiskMade(instance_id=instance_id, name=name, size_bytes=size_bytes, image_sha256=sha256):
                disk = SimulatedDisk(size_bytes, sys.intern(sha256), self.contents.of_image(sha256))
                self._directory(instance_id).disks[sys.intern(name)] = disk
            case DiskSet(instance_id=instance_id, name=name, disk=disk):
                disk = SimulatedDisk(disk.size_bytes, sys.intern(disk.image_sha256), _shared(disk.content))
                self._directory(instance_id).disks[sys.intern(name)] = disk
            case DiskGone(instance_id=instance_id, name=name):
                self._directory(instance_id).disks.pop(name, None)
            case PortsSet(instance_id=instance_id, ports=ports):
                if ports:
                    self.ports[instance_id] = ports
                else:
                    self.ports.pop(instance_id, None)
            case GuestGone(instance_id=instance_id):
                self.guests.pop(instance_id, None)
            case DirectoryGone(instance_id=instance_id):
                self.directories.pop(instance_id, None)
            case DirectorySetAside(instance_id=instance_id):
                self.aside[instance_id] = self.directories.pop(instance_id)
            case DirectoryBroughtBack(instance_id=instance_id):
                self.directories[instance_id] = self.aside.pop(instance_id)
            case AsideGone(instance_id=instance_id):
                self.aside.pop(instance_id, None)
            case ImageCached(sha256=sha256, content=content):
                self.images[sys.intern(sha256)] = None
                # A simulated disk needs no base image once it is made, so nobody has to be asked.
                if len(self.images) > CACHED_IMAGES_MAX:
                    del self.images[next(iter(self.images))]
                if content is not None:
                    self.contents.keep_image(sha256, content)
            case VolumeWritten(volume_id=volume_id, content=content):
                self.contents.write_volume(volume_id, content)
            case HostNoted(last_domain_id=last_domain_id):
                self.last_domain_id = max(self.last_domain_id, last_domain_id)

    def changes(self) -> Iterator[Change]:
        """The fewest changes that make this state; not what stands on volumes, which are on no host."""
        if self.last_domain_id:
            yield HostNoted(self.name, self.last_domain_id)
        for guest in self.guests.values():
            yield GuestSet(self.name, guest)
        for instance_id, directory in self.aside.items():
            yield from self._directory_changes(instance_id, directory)
            yield DirectorySetAside(self.name, instance_id)
        for instance_id, directory in self.directories.items():
            yield from self._directory_changes(instance_id, directory)
        for instance_id, ports in self.ports.items():
            yield PortsSet(self.name, instance_id, ports)
        for sha256 in self.images:
            yield ImageCached(self.name, sha256, self.contents.images.get(sha256))

    def _directory_changes(self, instance_id: str, directory: InstanceDirectory) -> Iterator[Change]:
        for name, disk in directory.disks.items():
            yield DiskSet(self.name, instance_id, name, disk)
        yield ConsoleWritten(self.name, instance_id, bytes(directory.console))

    def _directory(self, instance_id: str) -> InstanceDirectory:
        directory = self.directories.get(instance_id)
        if directory is None:
            directory = self.directories[instance_id] = InstanceDirectory()
        return directory

    # --- what stands on disks ---------------------------------------------------------------------------------------

    def content_of(self, guest: SimulatedGuest, disk: str) -> SimulatedContent | None:
        """What stands on a disk of the guest, or on a volume that it has (by its id); None where it has no such disk."""
        if (made := self.disks_of(guest.instance_id).get(disk)) is not None:
            return made.content
        if any(volume.volume_id == disk for volume in guest.volumes):
            return self.contents.of_volume(disk)
        return None

    def content_change(self, guest: SimulatedGuest, disk: str, content: SimulatedContent) -> Change:
        """The change that puts `content` on what `content_of` reads."""
        made = self.disks_of(guest.instance_id).get(disk)
        if made is None:
            return VolumeWritten(self.name, disk, content)
        return DiskSet(self.name, guest.instance_id, disk, msgspec.structs.replace(made, content=content))

    # --- guests ---------------------------------------------------------------------------------------------------

    def start(self, guest: SimulatedGuest) -> GuestState:
        """The guest runs under a new domain id and has booted: the counter on its boot disk is up, its console says so."""
        domain_id = self.last_domain_id + 1
        running = msgspec.structs.replace(
            guest, power_state=PowerState.RUNNING, domain_id=domain_id, memory=f"{self.name}/{domain_id}",
            saved=False, ran_us=0, since_us=now_us(),
        )  # fmt: skip
        disk = boot_disk(guest)
        content = self.content_of(guest, disk)
        boots = 1 if content is None else content.boots + 1
        changes: list[Change] = [GuestSet(self.name, running)]
        if content is not None:
            changes.append(self.content_change(guest, disk, msgspec.structs.replace(content, boots=boots)))
        self.change(*changes, ConsoleWritten(self.name, guest.instance_id, _boot_text(running, boots)))
        return self._tell(guest.instance_id, "started")

    def stop(self, instance_id: str, event: str, power_state: PowerState = PowerState.SHUTDOWN) -> GuestState:
        """The guest does not run; `event` says why (shutdown: by itself, stopped: destroyed, crashed)."""
        guest = self.running(instance_id)
        if guest is None:
            return self.state_of(instance_id)
        self.change(GuestSet(self.name, _without_memory(guest, power_state)))
        return self._tell(instance_id, event)

    def set_paused(self, instance_id: str, paused: bool) -> GuestState:
        """A guest that runs is paused, or goes on."""
        guest = self.running(instance_id)
        power_state = PowerState.PAUSED if paused else PowerState.RUNNING
        if guest is None or guest.power_state is power_state:
            return self.state_of(instance_id)
        since_us = 0 if paused else now_us()
        changed = msgspec.structs.replace(guest, power_state=power_state, ran_us=ran_us(guest), since_us=since_us)
        self.change(GuestSet(self.name, changed))
        return self._tell(instance_id, "paused" if paused else "resumed")

    def save(self, instance_id: str) -> GuestState:
        """A guest that runs does not run any more, its memory is saved."""
        guest = self.running(instance_id)
        if guest is None:
            return self.state_of(instance_id)
        saved = msgspec.structs.replace(
            guest, power_state=PowerState.SHUTDOWN, domain_id=None, saved=True, ran_us=ran_us(guest), since_us=0
        )
        self.change(GuestSet(self.name, saved))
        return self._tell(instance_id, "stopped")

    def load(self, guest: SimulatedGuest) -> GuestState:
        """A guest whose memory was saved goes on from there, under a new domain id and without a boot."""
        running = msgspec.structs.replace(
            guest, power_state=PowerState.RUNNING, domain_id=self.last_domain_id + 1, saved=False, since_us=now_us()
        )
        self.change(GuestSet(self.name, running))
        return self._tell(guest.instance_id, "started")

    def forget_saved(self, instance_id: str) -> None:
        """Memory that was saved is gone: the guest boots when it starts again."""
        guest = self.guests.get(instance_id)
        if guest is not None and guest.saved:
            self.change(GuestSet(self.name, _without_memory(guest, PowerState.SHUTDOWN)))

    def remove(self, instance_id: str) -> None:
        """The guest is neither running nor defined; its directory and ports stay."""
        if instance_id not in self.guests:
            return
        self.stop(instance_id, "stopped")
        self.change(GuestGone(self.name, instance_id))
        self._tell(instance_id, "removed")

    def hand_over(self, other: Machine, guest: SimulatedGuest) -> None:
        """A guest that runs here runs on the other machine, as `guest` and with what stands on its disks here."""
        instance_id = guest.instance_id
        there = msgspec.structs.replace(guest, domain_id=other.last_domain_id + 1)
        disks = [DiskSet(other.name, instance_id, name, disk) for name, disk in self.disks_of(instance_id).items()]
        self.change_with(other, *disks, GuestSet(other.name, there), GuestGone(self.name, instance_id))
        self._tell(instance_id, "removed")
        other._tell(instance_id, "started")

    def lacks(self, instance_id: str, disks: Iterable[str], ports: Iterable[str]) -> str:
        """What is not here yet of a guest that is to come with these disks and ports, in words; empty: nothing."""
        here = self.disks_of(instance_id)
        known = {port.id for port in self.ports.get(instance_id, ())}
        for name in disks:
            if name not in here:
                return f"disk {name} is not prepared on host {self.name}"
        for port_id in ports:
            if port_id not in known:
                return f"port {port_id} is not known on host {self.name}"
        return ""

    def take_over(self, guest: SimulatedGuest, disks: Mapping[str, SimulatedDisk]) -> None:
        """A guest that ran on a host of another process runs here, with this on its disks."""
        there = msgspec.structs.replace(guest, domain_id=self.last_domain_id + 1)
        changes = [DiskSet(self.name, guest.instance_id, name, disk) for name, disk in disks.items()]
        self.change(*changes, GuestSet(self.name, there))
        self._tell(guest.instance_id, "started")

    def give_away(self, instance_id: str) -> None:
        """The guest runs on a host of another process by now."""
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


def boot_disk(guest: SimulatedGuest) -> str:
    """The volume or the name of the disk that it boots from; empty when it has none."""
    return guest.boot_volume() or (guest.disks[0] if guest.disks else "")


def ran_us(guest: SimulatedGuest) -> int:
    """How long the guest's processors have run since it booted, microseconds."""
    return guest.ran_us + (max(0, now_us() - guest.since_us) if guest.since_us else 0)


@functools.lru_cache(maxsize=256)
def _of_boots(boots: int) -> SimulatedContent:
    return SimulatedContent(boots)


def _shared(content: SimulatedContent) -> SimulatedContent:
    """Thousands of disks on which nothing but a few boots stands share what stands on them."""
    return content if content.data or content.passwords_set else _of_boots(content.boots)


def _without_memory(guest: SimulatedGuest, power_state: PowerState) -> SimulatedGuest:
    return msgspec.structs.replace(
        guest, power_state=power_state, domain_id=None, memory="", saved=False, ran_us=0, since_us=0
    )


def _boot_text(guest: SimulatedGuest, boots: int) -> bytes:
    lines = [f"INSTAR-BOOT count={boots} uuid={guest.instance_id} hostname={guest.hostname}"]
    for number, port in enumerate(guest.ports):
        lines += [f"INSTAR-NET eth{number} address={address} mac={port.mac_address}" for address in port.addresses]
    return ("\n".join(lines) + "\n").encode()
