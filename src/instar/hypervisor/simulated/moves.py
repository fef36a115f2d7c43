"""A guest or its disks go from one simulated host to another, or aside and back on the same one. Called by the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from instar.config import SimulatedSettings
from instar.errors import HypervisorError, HypervisorUnavailable, MigrationAborted, StreamBroken, StreamRefused
from instar.hypervisor.contract import Report
from instar.hypervisor.simulated.disks import Disks, check_id
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.neighbours import AskDisks, AskReady, Neighbours, TakeGuest
from instar.hypervisor.simulated.progress import take_time
from instar.hypervisor.simulated.records import (
    AsideGone,
    Change,
    DirectoryBroughtBack,
    DirectorySetAside,
    DiskSet,
    ImageCached,
    PortsSet,
    SimulatedDisk,
    SimulatedGuest,
)
from instar.model.guest import DiskFile, DiskOffer, LiveTarget, MigrationProgress, WorkProgress
from instar.model.states import PowerState
from instar.model.stream import StreamAddress

_PARTS = 10  # of a live migration: progress is told, and trouble seen, so many times
_STUCK_LOOK_S = 0.02  # how often one that never converges looks for trouble

FindMachine = Callable[[str], Machine | None]


class _LiveMove:
    """A live migration that runs."""

    __slots__ = ("aborted", "forced", "wake")

    def __init__(self) -> None:
        self.aborted = False
        self.forced = False
        self.wake = asyncio.Event()


class Moves:
    """`neighbours` reaches hosts of other processes, where there are any."""

    __slots__ = ("_disks", "_faults", "_find", "_live", "_machine", "_settings", "neighbours")

    def __init__(
        self, machine: Machine, settings: SimulatedSettings, disks: Disks, faults: HostFaults, find: FindMachine
    ) -> None:
        self._machine = machine
        self._settings = settings
        self._disks = disks
        self._faults = faults
        self._find = find
        self._live: dict[str, _LiveMove] = {}
        self.neighbours: Neighbours | None = None

    def address(self) -> StreamAddress:
        if self.neighbours is not None:
            return self.neighbours.address(self._machine.name)
        return StreamAddress(host=self._machine.name, address="simulated", port=0, certificate="")

    # --- of a guest that is off ---------------------------------------------------------------------------------------

    async def set_aside(self, instance_id: str) -> None:
        check_id(instance_id)
        machine = self._machine
        if machine.running(instance_id) is not None:
            raise HypervisorError(reason="the disks of a running guest cannot be set aside")
        if instance_id in machine.aside and instance_id in machine.directories:
            return  # set aside, and then received on the same host: what is here now is the new one
        if instance_id in machine.directories:
            if self._settings.move_s:
                await asyncio.sleep(self._settings.move_s)
            machine.change(DirectorySetAside(machine.name, instance_id))
        machine.remove(instance_id)
        if instance_id in machine.ports:
            machine.change(PortsSet(machine.name, instance_id, ()))

    def offer(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        check_id(instance_id)
        self._let_in(instance_id, to)
        directory = self._machine.aside.get(instance_id)
        if directory is None:
            raise HypervisorError(reason="no disks of the instance are set aside")
        return self._offer_of(directory.disks)

    async def receive(self, instance_id: str, offer: DiskOffer, report: Report) -> None:
        check_id(instance_id)
        machine = self._machine
        if all(file.name in machine.disks_of(instance_id) for file in offer.disks):
            return
        self._disks.check_room()
        await self._offered(instance_id, offer)
        if offer.source.host != machine.name:  # on the same host nothing is copied
            await take_time(self._settings.move_s, instance_id, report)
        there = await self._offered(instance_id, offer)
        changes = self._images_of(offer)
        here = machine.disks_of(instance_id)
        for file in offer.disks:
            if file.name not in here:
                changes.append(DiskSet(machine.name, instance_id, file.name, there[file.name]))
        machine.change(*changes)
        report(WorkProgress(instance_id, 100))

    def bring_back(self, instance_id: str) -> None:
        check_id(instance_id)
        if instance_id not in self._machine.aside:
            return
        if self._machine.running(instance_id) is not None:
            raise HypervisorError(reason="the disks of a running guest cannot be replaced")
        self._machine.forget_saved(instance_id)
        self._machine.change(DirectoryBroughtBack(self._machine.name, instance_id))

    def forget_aside(self, instance_id: str) -> None:
        check_id(instance_id)
        if instance_id in self._machine.aside:
            self._machine.change(AsideGone(self._machine.name, instance_id))

    def _reach(self, host: str) -> Machine | None:
        """The machine of that name, where it can be reached from this one."""
        machine = self._find(host)
        if machine is None or machine is self._machine:
            return machine
        return None if machine.away or machine.cut_off or self._machine.cut_off else machine

    def _offer_of(self, disks: dict[str, SimulatedDisk]) -> DiskOffer:
        files = (
            DiskFile(name, disk.size_bytes, disk.size_bytes, disk.image_sha256 or None) for name, disk in disks.items()
        )
        return DiskOffer(self.address(), tuple(files))

    def _let_in(self, instance_id: str, peer: StreamAddress) -> None:
        """A host of another process may ask about the instance."""
        if self.neighbours is not None and self._find(peer.host) is None:
            self.neighbours.let_in(peer, instance_id)

    def _elsewhere(self, peer: StreamAddress) -> Neighbours | None:
        """By which the peer is asked, when it is a host of another process."""
        if self._find(peer.host) is not None or not peer.port or self._machine.cut_off:
            return None
        return self.neighbours

    async def _offered(self, instance_id: str, offer: DiskOffer) -> dict[str, SimulatedDisk]:
        """What the source still has of the offer. Raises StreamBroken, StreamRefused, HypervisorUnavailable."""
        if self._machine.away:
            raise HypervisorUnavailable(host=self._machine.name)
        host = offer.source.host
        if (neighbours := self._elsewhere(offer.source)) is not None:
            disks = (await neighbours.ask(offer.source, instance_id, AskDisks(host, instance_id))).disks
        else:
            source = self._reach(host)
            if source is None:
                raise StreamBroken(host=host, reason="the host cannot be reached")
            directory = source.aside.get(instance_id)
            disks = directory.disks if directory is not None else {}
        if any(file.name not in disks for file in offer.disks):
            raise StreamBroken(host=host, reason="the host does not offer the disks any more")
        return disks

    def _images_of(self, offer: DiskOffer) -> list[Change]:
        """The base images of the offer that are not in this host's cache yet."""
        bases = {file.base_sha256 for file in offer.disks if file.base_sha256 is not None} - self._machine.images.keys()
        contents = self._machine.contents.images
        return [ImageCached(self._machine.name, sha256, contents.get(sha256)) for sha256 in sorted(bases)]

    # --- of a guest that runs -----------------------------------------------------------------------------------------

    def offer_live(self, instance_id: str, to: StreamAddress) -> DiskOffer:
        check_id(instance_id)
        self._let_in(instance_id, to)
        guest = self._machine.running(instance_id)
        if guest is None:
            raise HypervisorError(reason="the guest does not run")
        return self._offer_of(self._machine.disks_of(instance_id))

    def make_ready(self, instance_id: str, offer: DiskOffer) -> LiveTarget:
        """Base images and empty disks for the guest are here."""
        check_id(instance_id)
        machine = self._machine
        self._let_in(instance_id, offer.source)
        images = self._images_of(offer)
        if images and self._elsewhere(offer.source) is None and self._reach(offer.source.host) is None:
            raise StreamBroken(host=offer.source.host, reason="the host cannot be reached")
        here = machine.disks_of(instance_id)
        missing = [file for file in offer.disks if file.name not in here]
        if missing:
            self._disks.check_room()
        empty = [
            DiskSet(machine.name, instance_id, file.name, SimulatedDisk(file.virtual_size_bytes, file.base_sha256 or ""))
            for file in missing
        ]
        if images or empty:
            machine.change(*images, *empty)
        return LiveTarget(self.address())

    async def migrate(self, wanted: SimulatedGuest, target: LiveTarget, report: Report) -> None:
        """The guest of this id runs on the target, as `wanted` defines it."""
        instance_id = wanted.instance_id
        check_id(instance_id)
        guest = self._machine.running(instance_id)
        if guest is None:
            if await self._runs_there(wanted, target):
                return
            raise HypervisorError(reason="the guest does not run")
        if self._elsewhere(target.address) is not None and await self._runs_there(wanted, target):
            self._machine.give_away(instance_id)  # it was taken over, and we were cut off before we heard of it
            return
        other = await self._ready(wanted, target)
        move = self._live[instance_id] = _LiveMove()
        try:
            await self._copy(move, guest, wanted, target, report)
        finally:
            del self._live[instance_id]
        now = self._machine.guests[instance_id]
        moved = msgspec.structs.replace(
            wanted, power_state=now.power_state, memory=now.memory, ran_us=now.ran_us, since_us=now.since_us,
            has_agent=now.has_agent, has_config_drive=now.has_config_drive,
        )  # fmt: skip
        if other is not None:
            self._machine.hand_over(other, moved)
        elif self.neighbours is not None:
            await self._give_away(self.neighbours, moved, target)
        report(self._progress(guest, 100))

    async def _give_away(self, neighbours: Neighbours, moved: SimulatedGuest, target: LiveTarget) -> None:
        """It stands still here before it may run there: where the answer is lost, it never runs on both."""
        instance_id = moved.instance_id
        take = TakeGuest(target.address.host, moved, self._machine.disks_of(instance_id))
        self._machine.set_paused(instance_id, True)
        try:
            await neighbours.ask(target.address, instance_id, take)
        except (HypervisorError, StreamBroken, StreamRefused):
            if not await self._has_come(moved, target):
                self._machine.set_paused(instance_id, moved.power_state is PowerState.PAUSED)
                raise
        self._machine.give_away(instance_id)

    async def _has_come(self, moved: SimulatedGuest, target: LiveTarget) -> bool:
        """Raises StreamBroken, StreamRefused where the target does not tell."""
        try:
            return await self._runs_there(moved, target)
        except HypervisorError:  # it could not even come
            return False

    def abort(self, instance_id: str) -> None:
        if (move := self._live.get(instance_id)) is not None:
            move.aborted = True
            move.wake.set()

    def force(self, instance_id: str) -> None:
        if (move := self._live.get(instance_id)) is not None:
            move.forced = True
            move.wake.set()

    async def _runs_there(self, wanted: SimulatedGuest, target: LiveTarget) -> bool:
        """Whether an earlier call has brought the guest to the target already."""
        if (neighbours := self._elsewhere(target.address)) is not None:
            question = AskReady(target.address.host, wanted.instance_id, (), ())
            return (await neighbours.ask(target.address, wanted.instance_id, question)).runs
        there = self._find(target.address.host)
        return there is not None and there is not self._machine and there.running(wanted.instance_id) is not None

    async def _ready(self, wanted: SimulatedGuest, target: LiveTarget) -> Machine | None:
        """The target can receive the guest: its machine, or None for one of another process. Raises HypervisorError,
        StreamBroken, StreamRefused."""
        instance_id, host = wanted.instance_id, target.address.host
        disks, ports = tuple(self._machine.disks_of(instance_id)), tuple(port.id for port in wanted.ports)
        if (neighbours := self._elsewhere(target.address)) is not None:
            await neighbours.ask(target.address, instance_id, AskReady(host, instance_id, disks, ports))
            return None
        other = self._reach(host)
        if other is None or other is self._machine:
            raise HypervisorError(reason=f"host {host} cannot be reached")
        if lacking := other.lacks(instance_id, disks, ports):
            raise HypervisorError(reason=lacking)
        return other

    async def _copy(
        self, move: _LiveMove, guest: SimulatedGuest, wanted: SimulatedGuest, target: LiveTarget, report: Report
    ) -> None:
        """The time that it takes; ends early when it is forced. Raises MigrationAborted, HypervisorError."""
        part = 0
        while (part < _PARTS and self._settings.live_s) or self._faults.live_never_converges:
            if move.forced:
                return
            report(self._progress(guest, min(99, 100 * part // _PARTS)))
            try:
                async with asyncio.timeout(self._settings.live_s / _PARTS or _STUCK_LOOK_S):
                    await move.wake.wait()
            except TimeoutError:
                part += 1
            await self._check_going_on(move, guest, wanted, target)

    async def _check_going_on(
        self, move: _LiveMove, guest: SimulatedGuest, wanted: SimulatedGuest, target: LiveTarget
    ) -> None:
        if move.aborted:
            raise MigrationAborted(id=guest.instance_id)
        if self._machine.away:
            raise HypervisorUnavailable(host=self._machine.name)
        now = self._machine.running(guest.instance_id)
        if now is None or now.domain_id != guest.domain_id:
            raise HypervisorError(reason="the guest ended while it was moved")
        await self._ready(wanted, target)

    def _progress(self, guest: SimulatedGuest, percent: int) -> WorkProgress:
        memory = guest.memory_mib << 20
        disk = sum(disk.size_bytes for disk in self._machine.disks_of(guest.instance_id).values())
        bytes_moved = MigrationProgress(
            memory_total=memory,
            memory_processed=memory * percent // 100,
            memory_remaining=memory - memory * percent // 100,
            disk_total=disk,
            disk_processed=disk * percent // 100,
            disk_remaining=disk - disk * percent // 100,
        )
        return WorkProgress(guest.instance_id, percent, bytes_moved)
