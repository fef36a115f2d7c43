"""The agent of a host, or of many simulated ones: takes commands from the bus, fences stale ones, calls the hypervisor,
reports inventory and events. It needs no database.

Commands for one instance run one after another, in the order in which they come; those for different ones side by side.
One that only waits for its guest gives way to a newer operation: a delete is not kept waiting by a stop's grace time.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from instar import __version__
from instar.agent.admission import Admission
from instar.agent.fence import Fence
from instar.agent.locks import Locks
from instar.bus.contract import Bus, Message, Reply, Subscription
from instar.config import HostSettings
from instar.errors import CommandUnknown, HypervisorUnavailable, InstarError, StaleEpoch, StepFailed
from instar.hypervisor.contract import Hypervisor
from instar.model import commands as c
from instar.model.guest import GuestEvent, HostCensus, WorkProgress
from instar.model.host import HOST_REPORTS, HOST_REPORTS_TOGETHER, HostEvent, HostReport, HostReports
from instar.tracing import ids, spans

log = structlog.get_logger()

_decoders: dict[str, msgspec.msgpack.Decoder[c.AnyCommand]] = {
    command.__name__: msgspec.msgpack.Decoder(command) for command in c.AnyCommand.__args__
}
_encode = msgspec.msgpack.Encoder(enc_hook=str).encode
INVENTORY_DEADLINE_S = 10.0
PROGRESS_EVERY_S = 0.5
KIND_SHOWN_MAX = 60
DATA_MOVES_MAX_S = 7 * 86_400.0
REPORTS_PER_HEARTBEAT = 50  # messages, at least, of an agent of very many hosts
REPORTS_TOGETHER_MAX = 200


class Agent:
    """`hypervisors` maps a host's name to its hypervisor. `boot_id` tells one start of the machine from the next.

    `reports_together`: many hosts are reported in one message, which only those may do who may speak of every host."""

    def __init__(
        self,
        hypervisors: Mapping[str, Hypervisor],
        bus: Bus,
        fence: Fence,
        settings: HostSettings,
        *,
        boot_id: Callable[[], str],
        reports_together: bool = False,
    ) -> None:
        self.id = os.urandom(4).hex()
        self._hypervisors = hypervisors
        self._first_host = next(iter(hypervisors), "")
        self._bus = bus
        self._fence = fence
        self._settings = settings
        self._boot_id = boot_id
        self._together_max = REPORTS_TOGETHER_MAX if reports_together else 1
        self._locks = Locks()
        admission = Path(f"{fence.path}.shut") if fence.path is not None else None
        self._admission = Admission(hypervisors, admission, down_after_s=settings.down_after_s)
        self._waits: dict[str, _Wait] = {}
        self._served: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._reports: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect to the hypervisors, serve each host's queue, report for the first time."""
        self._fence.open()
        self._admission.open()
        if self._hypervisors:
            # One answer is for all hosts of this process; its hosts ask by turns.
            self._served.append(await self._bus.subscribe(c.HOSTS_HEARD + self._first_host, self._on_heard))
        for host, hypervisor in self._hypervisors.items():
            try:
                await hypervisor.open(self._event_sender(host))
            except HypervisorUnavailable as error:
                log.warning("agent.hypervisor_away", host=host, reason=error.message)  # it reconnects by itself
            self._served.append(
                await self._bus.serve(
                    c.HOST_QUEUE + host, self._handler(host, hypervisor), concurrency_max=self._settings.commands_max
                )
            )
        hosts = list(self._hypervisors)
        for number in range(0, len(hosts), self._together_max):
            await self._report(hosts[number : number + self._together_max], asking=self._first_host)
        self._reports = asyncio.create_task(self._report_for_ever(), name="agent reports")

    async def close(self) -> None:
        """Stop taking commands and disconnect. Guests go on."""
        tasks = [*self._tasks, *([self._reports] if self._reports else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for subscription in self._served:
            await subscription.cancel()
        for hypervisor in self._hypervisors.values():
            await hypervisor.close()
        self._fence.close()

    # --- commands ---------------------------------------------------------------------------------------------------

    def _handler(self, host: str, hypervisor: Hypervisor) -> Callable[[Message], asyncio.Future[Reply]]:
        async def handle(message: Message) -> Reply:
            started = time.perf_counter_ns()
            try:
                command = _decoded(host, message)
                ids.bind(ids.request_of(message.trace), host=host, instance_id=command.instance_id, epoch=command.epoch)
                with spans.span(f"host {message.kind}", kind="server", parent=message.trace, **{"instar.host": host}):
                    body = await self._fenced(host, hypervisor, command)
            except InstarError as error:
                return Reply(error=(type(error).__name__, error.message, _plain(error.facts)), took_us=_since(started))
            except Exception:
                log.exception("agent.command_crashed", host=host, command=message.kind)
                failure = StepFailed(step=f"{message.kind} on host {host}")
                return Reply(error=("StepFailed", failure.message, failure.facts), took_us=_since(started))
            return Reply(body=body, took_us=_since(started))

        return handle  # type: ignore[return-value]

    async def _fenced(self, host: str, hypervisor: Hypervisor, command: c.AnyCommand) -> bytes:
        if isinstance(command, c.Admit):
            await self._admit(host, hypervisor, command)
            return _encode(None)
        if not isinstance(command, c.WHILE_SHUT):
            self._admission.check(host, command.session)
        if not command.instance_id or isinstance(command, c.UNFENCED):
            return _encode(await self._do(host, hypervisor, command))
        key = f"{host} {command.instance_id}"
        if command.epoch:
            self._fence.check(host, command.instance_id, command.epoch)
            self._end_wait(key, command.epoch)
        async with self._locks.hold(key):
            # Asked again after the lock: while this command waited, a newer operation may have come and gone.
            if command.epoch:
                self._fence.check(host, command.instance_id, command.epoch)
            if not isinstance(command, c.WHILE_SHUT):
                self._admission.check(host, command.session)
            wait_s = _wait_s(command)
            if not wait_s:
                return _encode(await self._do(host, hypervisor, command))
            return _encode(await self._wait(key, command, self._do(host, hypervisor, command), wait_s))

    async def _admit(self, host: str, hypervisor: Hypervisor, command: c.Admit) -> None:
        """What others have now is removed here first; only then anything else of this host goes on."""
        for departed in command.departed:
            if departed.epoch:
                self._fence.check(host, departed.instance_id, departed.epoch)
                self._end_wait(f"{host} {departed.instance_id}", departed.epoch)
            async with self._locks.hold(f"{host} {departed.instance_id}"):
                log.warning("agent.removes_departed", host=host, instance=departed.instance_id)
                await hypervisor.ensure_absent(departed.instance_id, keep_disks=departed.keep_disks)
        self._admission.admit(host, command.session)
        await self._report([host])

    async def _on_heard(self, message: Message) -> None:
        self._admission.answered(msgspec.msgpack.decode(message.body, type=int))

    async def _wait(self, key: str, command: c.AnyCommand, work: Awaitable[object], wait_s: float) -> object:
        """Work that mostly waits for a guest, up to `wait_s`. Raises StaleEpoch when a newer operation ended the wait."""
        wait = self._waits[key] = _Wait(command.epoch, time.monotonic() + wait_s, asyncio.ensure_future(work))
        try:
            return await wait.task
        except asyncio.CancelledError:
            if wait.superseded:
                raise StaleEpoch(id=command.instance_id) from None
            raise
        finally:
            del self._waits[key]

    def _end_wait(self, key: str, epoch: int) -> None:
        wait = self._waits.get(key)
        # After its time it no longer waits but acts (destroys the guest): that is left to its end.
        if wait is not None and wait.epoch < epoch and time.monotonic() < wait.until:
            wait.superseded = True
            wait.task.cancel()

    def _do(self, host: str, hypervisor: Hypervisor, command: c.AnyCommand) -> Awaitable[object]:
        """One line for each command: what it asks of the hypervisor."""
        instance_id = command.instance_id
        report = self._progress_sender(host, command.epoch)
        match command:
            case c.Observe():
                return hypervisor.observe(instance_id)
            case c.EnsureImage(image=image):
                return hypervisor.ensure_image(image)
            case c.EnsureDisk(disk=disk):
                return hypervisor.ensure_disk(instance_id, disk)
            case c.EnsureNoDisks():
                return hypervisor.ensure_no_disks(instance_id)
            case c.EnsurePorts(ports=ports):
                return hypervisor.ensure_ports(instance_id, ports)
            case c.EnsureNoPorts():
                return hypervisor.ensure_no_ports(instance_id)
            case c.EnsureRunning(guest=guest):
                return hypervisor.ensure_running(guest)
            case c.EnsureRestarted(guest=guest, was_domain_id=was):
                return hypervisor.ensure_restarted(guest, was_domain_id=was)
            case c.EnsureStopped(grace_s=grace_s):
                return hypervisor.ensure_stopped(instance_id, grace_s=grace_s)
            case c.AwaitSoftReboot(was_domain_id=was_id, wait_s=wait_s):
                return hypervisor.await_soft_reboot(instance_id, was_domain_id=was_id, wait_s=wait_s)
            case c.EnsureAbsent(keep_disks=keep_disks):
                return hypervisor.ensure_absent(instance_id, keep_disks=keep_disks)
            case c.ReadConsole(length_bytes=length_bytes):
                return hypervisor.console_output(instance_id, length_bytes=length_bytes)
            case c.OpenConsole(kind=kind, to=to):
                return hypervisor.offer_console(instance_id, kind, to)
            case c.TakeCensus():
                return self._census(hypervisor)
            case c.EnsurePaused():
                return hypervisor.ensure_paused(instance_id)
            case c.EnsureSuspended():
                return hypervisor.ensure_suspended(instance_id)
            case c.EnsureDiskSize(disk=disk):
                return hypervisor.ensure_disk_size(instance_id, disk)
            case c.EnsureNoDisk(name=name):
                return hypervisor.ensure_no_disk(instance_id, name)
            case c.EnsureDiskKept(name=name):
                return hypervisor.ensure_disk_kept(instance_id, name)
            case c.EnsureDiskRestored(name=name):
                return hypervisor.ensure_disk_restored(instance_id, name)
            case c.TakeSnapshot(disk=name, target=target):
                return hypervisor.take_snapshot(instance_id, name, target, report)
            case c.TellStreamAddress():
                return hypervisor.stream_address()
            case c.EnsureSetAside():
                return hypervisor.ensure_set_aside(instance_id)
            case c.OfferDisks(to=to):
                return hypervisor.offer_disks(instance_id, to)
            case c.ReceiveDisks(offer=offer):
                return hypervisor.receive_disks(instance_id, offer, report)
            case c.EnsureBroughtBack():
                return hypervisor.ensure_brought_back(instance_id)
            case c.EnsureNothingAside():
                return hypervisor.ensure_nothing_aside(instance_id)
            case c.OfferLive(to=to):
                return hypervisor.offer_live(instance_id, to)
            case c.EnsureReadyForLive(guest=guest, offer=offer):
                return hypervisor.ensure_ready_for_live(guest, offer)
            case c.MigrateLive(guest=guest, target=live_target, options=options):
                return hypervisor.migrate_live(guest, live_target, options, report)
            case c.AbortLive():
                return hypervisor.abort_live(instance_id)
            case c.ForceLive():
                return hypervisor.force_live(instance_id)
            case c.EnsurePortPlugged(guest=guest, port_id=port_id):
                return hypervisor.ensure_port_plugged(guest, port_id)
            case c.EnsurePortUnplugged(port_id=port_id):
                return hypervisor.ensure_port_unplugged(instance_id, port_id)
            case c.EnsureVolumeAttached(guest=guest, volume_id=volume_id):
                return hypervisor.ensure_volume_attached(guest, volume_id)
            case c.EnsureVolumeDetached(volume_id=volume_id):
                return hypervisor.ensure_volume_detached(instance_id, volume_id)
            case c.SwapVolume(old_volume_id=old_volume_id, new=new):
                return hypervisor.swap_volume(instance_id, old_volume_id, new, report)
            case c.SetPassword(user=user, password=password):
                return hypervisor.set_password(instance_id, user, password)
            case c.AskGuestAgent():
                return hypervisor.has_guest_agent(instance_id)
            case c.Admit():
                return self._admit(host, hypervisor, command)
            case c.ReadDiagnostics():
                return hypervisor.diagnostics(instance_id)

    # --- reports ----------------------------------------------------------------------------------------------------

    def _event_sender(self, host: str) -> Callable[[GuestEvent], None]:
        def send(event: GuestEvent) -> None:
            body = _encode(HostEvent(host, event))
            task = asyncio.create_task(self._bus.publish(c.GUEST_EVENTS, Message("HostEvent", body, host=host)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return send

    def _progress_sender(self, host: str, epoch: int) -> Callable[[WorkProgress], None]:
        """Tells at most once in PROGRESS_EVERY_S, and always the end: called as often as the driver likes, on the loop."""
        told_at = float("-inf")

        def send(progress: WorkProgress) -> None:
            nonlocal told_at
            if time.monotonic() - told_at < PROGRESS_EVERY_S and progress.percent < 100:
                return
            told_at = time.monotonic()
            body = _encode(c.HostProgress(host, epoch, progress))
            task = asyncio.create_task(self._bus.publish(c.WORK_PROGRESS, Message("HostProgress", body, host=host)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return send

    async def _census(self, hypervisor: Hypervisor) -> HostCensus:
        return msgspec.structs.replace(await hypervisor.census(), boot_id=self._boot_id())

    async def _report_for_ever(self) -> None:
        """Each host once in a heartbeat, spread over its time so that thousands do not come at once."""
        hosts = list(self._hypervisors)
        group = min(self._together_max, max(1, len(hosts) // REPORTS_PER_HEARTBEAT))
        pause_every = max(group, len(hosts) // REPORTS_PER_HEARTBEAT)
        for turn in itertools.count(1):
            started = time.monotonic()
            for number in range(0, len(hosts), group):
                if number % pause_every < group:
                    due = started + self._settings.heartbeat_s * (number / len(hosts))
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                some = hosts[number : number + group]
                try:
                    await self._report(some, asking=hosts[turn % len(hosts)])
                except Exception:
                    log.exception("agent.report_failed", host=some[0], hosts=len(some))
            await asyncio.sleep(max(0.0, started + self._settings.heartbeat_s - time.monotonic()))

    async def _report(self, hosts: Sequence[str], *, asking: str = "") -> None:
        """Of some hosts. The one that is `asking` wants an answer."""
        boot_id = self._boot_id()
        reports = [await self._report_of(host, boot_id, asks=host == asking) for host in hosts]
        if self._together_max == 1:
            for report in reports:
                await self._bus.publish(HOST_REPORTS, Message("HostReport", _encode(report), host=report.host))
            return
        await self._bus.publish(HOST_REPORTS_TOGETHER, Message("HostReports", _encode(HostReports(tuple(reports)))))

    async def _report_of(self, host: str, boot_id: str, *, asks: bool) -> HostReport:
        inventory = None
        try:
            async with asyncio.timeout(INVENTORY_DEADLINE_S):
                inventory = await self._hypervisors[host].inventory()
        except (InstarError, TimeoutError) as error:
            log.debug("agent.hypervisor_away", host=host, reason=str(error))
        return HostReport(
            host, boot_id, self.id, inventory is not None, inventory,
            session=self._admission.session_of(host), shut=self._admission.is_shut(host),
            ask=self._admission.ask() if asks else 0, answer_to=self._first_host, agent_version=__version__,
            protocol=c.PROTOCOL,
        )  # fmt: skip


class _Wait:
    """A command that waits for its guest until `until` (monotonic seconds)."""

    def __init__(self, epoch: int, until: float, task: asyncio.Future[object]) -> None:
        self.epoch = epoch
        self.until = until
        self.task = task
        self.superseded = False


def _decoded(host: str, message: Message) -> c.AnyCommand:
    """Raises CommandUnknown for one that this version does not know, or that has what it needs in another form."""
    decoder = _decoders.get(message.kind)
    if decoder is None:
        raise CommandUnknown(host=host, version=__version__, command=message.kind[:KIND_SHOWN_MAX])
    try:
        return decoder.decode(message.body)
    except msgspec.MsgspecError as error:
        log.warning("agent.command_not_understood", host=host, command=message.kind, reason=str(error))
        raise CommandUnknown(host=host, version=__version__, command=message.kind) from error


def _wait_s(command: c.AnyCommand) -> float:
    match command:
        case c.EnsureStopped(grace_s=grace_s):
            return grace_s
        case c.AwaitSoftReboot(wait_s=wait_s):
            return wait_s
        case c.TakeSnapshot() | c.ReceiveDisks() | c.MigrateLive() | c.SwapVolume():
            return DATA_MOVES_MAX_S  # at any moment a newer operation may end it
    return 0.0


def _since(started_ns: int) -> int:
    return (time.perf_counter_ns() - started_ns) // 1000


def _plain(facts: dict[str, object]) -> dict[str, str | int | float | None]:
    return {name: v if isinstance(v, str | int | float | None) else str(v) for name, v in facts.items()}
