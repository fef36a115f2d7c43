"""Telling hosts what to ensure: the conductor's side of `hypervisor.contract`, over the bus.

A `HostClient` belongs to one operation and stamps its epoch on every command. Each method is a step's call: its arguments
and its result can be journaled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from instar.bus.contract import Bus, Message, NobodyListens, Reply
from instar.engine.lease import ensure_lease
from instar.errors import HostNotReady, HostUnreachable, StepTimeout, revive
from instar.model import commands as c
from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.guest import (
    DiskDefinition,
    DiskOffer,
    GuestDefinition,
    GuestDiagnostics,
    GuestState,
    HostCensus,
    ImageSource,
    LiveMigrationOptions,
    LiveTarget,
    SnapshotTaken,
    SnapshotTarget,
    SoftRebootOutcome,
)
from instar.model.network import PortDefinition
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeDisk
from instar.tracing.spans import outgoing

T = TypeVar("T")
_encode = msgspec.msgpack.Encoder().encode
ANSWER_MARGIN_S = 5.0  # a command that waits for a guest gets so much more time for its answer
AGAIN_AFTER_S = 0.25  # a host that is not there right now is asked again
LOOK_EVERY_S = 0.5  # whether a host that works for long still shows that it lives

FellSilent = Callable[[str, float], bool]  # host, seconds that it was waited for


SessionOf = Callable[[str], int]
NOT_READY_MAX_S = 20.0  # a host that came back is told at once what it lost; longer is as if it were away
NOT_READY_RETRY_S = 0.1


def no_session(_host: str) -> int:
    """Of those who do not follow hosts' reports."""
    return 0


def never_silent(_host: str, _waited_s: float) -> bool:
    """Of those who do not follow hosts' reports."""
    return False


class HostClient:
    """Commands to hosts for one instance under one epoch (0 and no instance: questions that change nothing).

    A command ends when `fell_silent` says of its host that it shows no life: a disk may be copied for hours, and a bus may
    keep commands for a host that is gone. One that came back and is not admitted yet is asked again for a while, unless
    whoever asks is the one to admit it (`waits_for_admission`): then HostNotReady is raised."""

    participant = "compute"

    def __init__(
        self,
        bus: Bus,
        *,
        instance_id: str = "",
        epoch: int = 0,
        deadline_s: float = 120.0,
        fell_silent: FellSilent = never_silent,
        session_of: SessionOf = no_session,
        waits_for_admission: bool = True,
    ) -> None:
        self._bus = bus
        self._instance_id = instance_id
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._fell_silent = fell_silent
        self._session_of = session_of
        self._waits_for_admission = waits_for_admission
        self.hypervisor_us = 0  # time that hosts themselves worked, since it was last set to 0

    async def observe(self, host: str) -> GuestState:
        return await self._call(host, c.Observe(**self._fence()), GuestState)

    async def observe_of(self, host: str, instance_id: str) -> GuestState:
        """The same of any instance: a question, which no epoch fences."""
        return await self._call(host, c.Observe(instance_id=instance_id), GuestState)

    async def ensure_image(self, host: str, image: ImageSource) -> None:
        await self._call(host, c.EnsureImage(image=image, **self._fence()), None)

    async def ensure_disk(self, host: str, disk: DiskDefinition) -> None:
        await self._call(host, c.EnsureDisk(disk=disk, **self._fence()), None)

    async def ensure_no_disks(self, host: str, *_: Any) -> None:
        await self._call(host, c.EnsureNoDisks(**self._fence()), None)

    async def ensure_ports(self, host: str, ports: tuple[PortDefinition, ...]) -> None:
        await self._call(host, c.EnsurePorts(ports=ports, **self._fence()), None)

    async def ensure_no_ports(self, host: str, *_: Any) -> None:
        await self._call(host, c.EnsureNoPorts(**self._fence()), None)

    async def ensure_running(self, host: str, guest: GuestDefinition) -> GuestState:
        return await self._call(host, c.EnsureRunning(guest=guest, **self._fence()), GuestState)

    async def ensure_restarted(self, host: str, guest: GuestDefinition, was_domain_id: int | None) -> GuestState:
        command = c.EnsureRestarted(guest=guest, was_domain_id=was_domain_id, **self._fence())
        return await self._call(host, command, GuestState)

    async def ensure_stopped(self, host: str, grace_s: float, *_: Any) -> GuestState:
        return await self._call(host, c.EnsureStopped(grace_s=grace_s, **self._fence()), GuestState, extra_s=grace_s)

    async def start_again(self, host: str, _grace_s: float, guest: GuestDefinition) -> GuestState:
        """Undo of stopping a guest: it runs again, on its ports."""
        if guest.ports:
            await self.ensure_ports(host, guest.ports)
        return await self.ensure_running(host, guest)

    async def ensure_not_running(self, host: str, *_: Any) -> None:
        """Undo of starting a guest that was defined before."""
        await self.ensure_stopped(host, 0.0)

    async def await_soft_reboot(self, host: str, was_domain_id: int, wait_s: float) -> SoftRebootOutcome:
        command = c.AwaitSoftReboot(was_domain_id=was_domain_id, wait_s=wait_s, **self._fence())
        return await self._call(host, command, SoftRebootOutcome, extra_s=wait_s)

    async def ensure_absent(self, host: str, *_: Any, keep_disks: bool = False) -> None:
        await self._call(host, c.EnsureAbsent(keep_disks=keep_disks, **self._fence()), None)

    async def ensure_no_guest(self, host: str, *_: Any) -> None:
        """Undo of `ensure_running`: the domain is gone, the disks are the business of their own step's undo."""
        await self.ensure_absent(host, keep_disks=True)

    def undo_of_running(self, disks: Sequence[DiskDefinition]) -> Callable[..., Awaitable[None]]:
        """Undo of `ensure_running` where the guest was made: a guest without disks of its own leaves nothing at all."""
        return self.ensure_no_guest if disks else self.ensure_absent

    async def console_output(self, host: str, length_bytes: int) -> bytes:
        return await self._call(host, c.ReadConsole(length_bytes=length_bytes, **self._fence()), bytes)

    async def open_console(self, host: str, kind: ConsoleKind, to: StreamAddress | None) -> ConsoleOffer:
        return await self._call(host, c.OpenConsole(kind=kind, to=to, **self._fence()), ConsoleOffer)

    async def admit(self, host: str, session: int, departed: tuple[c.Departed, ...]) -> None:
        """Raises HostNotReady when it is in another session by now."""
        await self._call(host, c.Admit(departed=departed, session=session), None)

    async def census(self, host: str) -> HostCensus:
        return await self._call(host, c.TakeCensus(), HostCensus)

    # --- memory and disks ---------------------------------------------------------------------------------------------

    async def ensure_paused(self, host: str, *_: Any) -> GuestState:
        return await self._call(host, c.EnsurePaused(**self._fence()), GuestState)

    async def ensure_suspended(self, host: str, *_: Any) -> GuestState:
        return await self._call(host, c.EnsureSuspended(**self._fence()), GuestState)

    async def ensure_disk_size(self, host: str, disk: DiskDefinition) -> None:
        await self._call(host, c.EnsureDiskSize(disk=disk, **self._fence()), None)

    async def ensure_no_disk(self, host: str, name: str) -> None:
        await self._call(host, c.EnsureNoDisk(name=name, **self._fence()), None)

    async def ensure_disk_unmade(self, host: str, disk: DiskDefinition) -> None:
        """Undo of `ensure_disk` where the instance has other disks besides."""
        await self.ensure_no_disk(host, disk.name)

    async def ensure_disk_kept(self, host: str, name: str) -> None:
        await self._call(host, c.EnsureDiskKept(name=name, **self._fence()), None)

    async def ensure_disk_restored(self, host: str, name: str) -> None:
        await self._call(host, c.EnsureDiskRestored(name=name, **self._fence()), None)

    async def take_snapshot(self, host: str, disk: str, target: SnapshotTarget, limit_s: float) -> SnapshotTaken:
        command = c.TakeSnapshot(disk=disk, target=target, **self._fence())
        return await self._call(host, command, SnapshotTaken, extra_s=limit_s)

    # --- moves ----------------------------------------------------------------------------------------------------------

    async def stream_address(self, host: str) -> StreamAddress:
        return await self._call(host, c.TellStreamAddress(), StreamAddress)

    async def ensure_set_aside(self, host: str, *_: Any) -> None:
        await self._call(host, c.EnsureSetAside(**self._fence()), None)

    async def offer_disks(self, host: str, to: StreamAddress) -> DiskOffer:
        return await self._call(host, c.OfferDisks(to=to, **self._fence()), DiskOffer)

    async def receive_disks(self, host: str, offer: DiskOffer, limit_s: float) -> None:
        await self._call(host, c.ReceiveDisks(offer=offer, **self._fence()), None, extra_s=limit_s)

    async def ensure_brought_back(self, host: str, *_: Any) -> None:
        await self._call(host, c.EnsureBroughtBack(**self._fence()), None)

    async def ensure_nothing_aside(self, host: str) -> None:
        await self._call(host, c.EnsureNothingAside(**self._fence()), None)

    async def offer_live(self, host: str, to: StreamAddress) -> DiskOffer:
        return await self._call(host, c.OfferLive(to=to, **self._fence()), DiskOffer)

    async def ensure_ready_for_live(self, host: str, guest: GuestDefinition, offer: DiskOffer) -> LiveTarget:
        return await self._call(host, c.EnsureReadyForLive(guest=guest, offer=offer, **self._fence()), LiveTarget)

    async def migrate_live(
        self, host: str, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, limit_s: float
    ) -> None:
        command = c.MigrateLive(guest=guest, target=target, options=options, **self._fence())
        await self._call(host, command, None, extra_s=limit_s)

    async def abort_live(self, host: str, *_: Any) -> None:
        await self._call(host, c.AbortLive(instance_id=self._instance_id), None)

    async def force_live(self, host: str) -> None:
        await self._call(host, c.ForceLive(instance_id=self._instance_id), None)

    # --- devices and small wishes ---------------------------------------------------------------------------------------

    async def ensure_port_plugged(self, host: str, guest: GuestDefinition, port_id: str) -> None:
        await self._call(host, c.EnsurePortPlugged(guest=guest, port_id=port_id, **self._fence()), None)

    async def ensure_port_not_plugged(self, host: str, _guest: GuestDefinition, port_id: str) -> None:
        """Undo of `ensure_port_plugged`."""
        await self.ensure_port_unplugged(host, port_id)

    async def ensure_port_unplugged(self, host: str, port_id: str) -> None:
        await self._call(host, c.EnsurePortUnplugged(port_id=port_id, **self._fence()), None)

    async def ensure_volume_attached(self, host: str, guest: GuestDefinition, volume_id: str) -> None:
        await self._call(host, c.EnsureVolumeAttached(guest=guest, volume_id=volume_id, **self._fence()), None)

    async def ensure_volume_not_attached(self, host: str, _guest: GuestDefinition, volume_id: str) -> None:
        """Undo of `ensure_volume_attached`."""
        await self.ensure_volume_detached(host, volume_id)

    async def ensure_volume_detached(self, host: str, volume_id: str) -> None:
        await self._call(host, c.EnsureVolumeDetached(volume_id=volume_id, **self._fence()), None)

    async def swap_volume(self, host: str, old_volume_id: str, new: VolumeDisk, limit_s: float) -> None:
        command = c.SwapVolume(old_volume_id=old_volume_id, new=new, **self._fence())
        await self._call(host, command, None, extra_s=limit_s)

    async def set_password(self, host: str, user: str, password: str) -> None:
        await self._call(host, c.SetPassword(user=user, password=password, **self._fence()), None)

    async def has_guest_agent(self, host: str) -> bool:
        return await self._call(host, c.AskGuestAgent(instance_id=self._instance_id), bool)

    async def diagnostics(self, host: str) -> GuestDiagnostics:
        return await self._call(host, c.ReadDiagnostics(instance_id=self._instance_id), GuestDiagnostics)

    def _fence(self) -> dict[str, Any]:
        return {"instance_id": self._instance_id, "epoch": self._epoch}

    async def _call(self, host: str, command: c.AnyCommand, result: type[T] | None, extra_s: float = 0.0) -> T:
        deadline_s = self._deadline_s + extra_s + (ANSWER_MARGIN_S if extra_s else 0.0)
        not_ready_from: float | None = None  # not from the beginning: the bus may have been away for longer than this lasts
        while True:
            await ensure_lease()  # one that was stopped, and goes on, tells no host anything before it knows that it may
            stamped = msgspec.structs.replace(command, session=command.session or self._session_of(host))
            reply = await self._ask(host, stamped, deadline_s)
            self.hypervisor_us += reply.took_us
            if reply.error is None:
                return msgspec.msgpack.decode(reply.body, type=result) if result is not None else None  # type: ignore[return-value]
            error = revive(*reply.error)
            if not isinstance(error, HostNotReady) or not self._waits_for_admission:
                raise error
            not_ready_from = time.monotonic() if not_ready_from is None else not_ready_from
            if time.monotonic() - not_ready_from > min(self._deadline_s, NOT_READY_MAX_S):
                raise HostUnreachable(host=host) from error
            await asyncio.sleep(NOT_READY_RETRY_S)  # it has done nothing, and soon says which session it is in

    async def _ask(self, host: str, command: c.AnyCommand, deadline_s: float) -> Reply:
        message = Message(type(command).__name__, _encode(command), deadline_s, outgoing(), epoch=command.epoch)
        try:
            async with asyncio.timeout(deadline_s + ANSWER_MARGIN_S):
                return await self._answered(host, message)
        except TimeoutError as error:
            what = f"host {host} to answer {message.kind}"
            raise StepTimeout(what=what, waited_s=deadline_s, host=host) from error

    async def _answered(self, host: str, message: Message) -> Reply:
        """A host whose agent is being started again has a moment: its silence decides. Raises HostUnreachable."""
        started = time.monotonic()
        while True:
            await ensure_lease()  # one that was stopped, and goes on, tells no host anything before it knows that it may
            try:
                return await self._watched(host, message)
            except NobodyListens as error:
                if self._fell_silent is never_silent or self._fell_silent(host, time.monotonic() - started):
                    raise HostUnreachable(host=host) from error
            await asyncio.sleep(AGAIN_AFTER_S)

    async def _watched(self, host: str, message: Message) -> Reply:
        """The answer to a command. Raises HostUnreachable when its host falls silent meanwhile: few buses know."""
        started, loop = time.monotonic(), asyncio.get_running_loop()
        if self._fell_silent(host, 0.0):
            raise HostUnreachable(host=host)
        next_look: asyncio.TimerHandle

        def look() -> None:
            nonlocal next_look
            if self._fell_silent(host, time.monotonic() - started):
                patience.reschedule(loop.time())
            else:
                next_look = loop.call_later(LOOK_EVERY_S, look)

        # A timer that is hardly ever reached, not a task beside: each operation asks several times.
        next_look = loop.call_later(LOOK_EVERY_S, look)
        try:
            async with asyncio.timeout(None) as patience:
                return await self._bus.call(c.HOST_QUEUE + host, message)
        except TimeoutError:
            if patience.expired():
                raise HostUnreachable(host=host) from None
            raise
        finally:
            next_look.cancel()


async def tell_leftovers(bus: Bus, host: str) -> None:
    """Something could not be removed from this host: whoever reconciles looks at it as soon as it answers."""
    await bus.publish(c.LEFTOVERS_TOPIC, Message("Leftovers", host.encode()))
