"""The reconciler: at start-up, on a timer, and when a host comes back, it holds what should be against what is.

It sees to what no operation does: guests that changed by themselves, guests to be started after a restart of their host,
leftovers of instances that were deleted while their host was away, claims and ports without an instance.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import msgspec
import structlog

from instar.bus.contract import Message, Subscription
from instar.clock import now_us
from instar.engine.hosts import HostClient
from instar.errors import HostNotReady, HostUnreachable, InstarError, NotFound, StaleEpoch, StorageAway, Unavailable
from instar.lifecycle.audit import Finding, Kind, audit, leftovers, mentioned
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.door import Lifecycle
from instar.lifecycle.find_guest import FindArguments
from instar.lifecycle.guest_events import GuestEvents
from instar.lifecycle.host_looks import HostLooks
from instar.lifecycle.power_sync import sync
from instar.lifecycle.timers import system_context
from instar.lifecycle.whereabouts import side_of
from instar.model.commands import GUEST_EVENTS, LEFTOVERS_TOPIC, Departed
from instar.model.guest import GuestState
from instar.model.host import HOST_REPORTS, HOST_REPORTS_TOGETHER, HostEvent
from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from instar.store.audit import (
    audit_instances_among,
    host_boot_save,
    host_boots_fetch,
    host_totals_recount,
    instances_evacuated,
    usage_recount,
)
from instar.store.conductors import KeeperLost
from instar.store.instances import instance_fetch, instances_about_host
from instar.store.operations import operations_prune

log = structlog.get_logger()

BUSY_RETRY_S = 1.0
AWAY_RETRY_S = 2.0
HOST_DEADLINE_S = 20.0
HOSTS_AT_ONCE = 32
PRUNE_EVERY_S = 3600.0
DAY_US = 86_400_000_000
KEPT_RUNNING = frozenset({VmState.ACTIVE, VmState.PAUSED})
KEPT_OFF = frozenset({VmState.SOFT_DELETED, VmState.SHELVED})  # a guest in any other state that runs by itself is let run


class _Said(msgspec.Struct, frozen=True):
    """Of a HostReport what a reconciler wants to know."""

    host: str
    boot_id: str
    agent_id: str
    hypervisor_ok: bool
    session: int = 0
    shut: bool = False


class _SaidTogether(msgspec.Struct, frozen=True):
    reports: tuple[_Said, ...]


_decode_said = msgspec.msgpack.Decoder(_Said).decode
_decode_said_together = msgspec.msgpack.Decoder(_SaidTogether).decode


class Reconciler:
    """Runs beside a conductor. `open` starts it; `settle_database` may be called by hand."""

    def __init__(self, cloud: Cloud, lifecycle: Lifecycle) -> None:
        self._cloud = cloud
        self._lifecycle = lifecycle
        self._settings = cloud.settings.host
        self._seen: dict[str, tuple[str, str, bool]] = {}  # host → (boot_id, agent_id, hypervisor_ok)
        self._shut: dict[str, int] = {}  # host that came back and waits to be admitted → its session
        self._boots: dict[str, str] = {}  # host → the start of the machine that it was last looked at in
        self._checked: dict[str, float] = {}
        self._away: set[str] = set()  # hosts that could not be looked at, which was said
        self._pruned = float("-inf")
        self._looks = HostLooks(self._settings.looks_per_s)
        self._events = GuestEvents(self._sync_guest, self._put)
        self._uploads_seen: set[str] = set()  # unfinished images without operation that the last look found
        self._taken_seen: set[str] = set()  # volumes and ports taken for no operation that the last look found
        self._tasks: list[asyncio.Task[None]] = []
        self._subscriptions: list[Subscription] = []

    async def open(self) -> None:
        bus = self._cloud.bus
        self._boots = await host_boots_fetch(self._cloud.store)
        self._subscriptions = [
            await bus.subscribe(HOST_REPORTS, self._on_report),
            await bus.subscribe(HOST_REPORTS_TOGETHER, self._on_reports),
            await bus.subscribe(GUEST_EVENTS, self._on_event),
            await bus.subscribe(LEFTOVERS_TOPIC, self._on_leftovers),
        ]
        self._tasks = [asyncio.create_task(self._work(), name="reconcile hosts") for _ in range(HOSTS_AT_ONCE)]
        self._events.open()
        self._tasks.append(asyncio.create_task(self._on_timer(), name="reconcile timer"))

    async def close(self) -> None:
        for subscription in self._subscriptions:
            await subscription.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._events.close()

    # --- what makes it run ------------------------------------------------------------------------------------------

    async def _on_report(self, message: Message) -> None:
        self._hear(_decode_said(message.body))

    async def _on_reports(self, message: Message) -> None:
        for said in _decode_said_together(message.body).reports:
            self._hear(said)

    def _hear(self, said: _Said) -> None:
        now, before = (said.boot_id, said.agent_id, said.hypervisor_ok), self._seen.get(said.host)
        self._seen[said.host] = now
        if said.shut:
            self._shut[said.host] = said.session
        else:
            self._shut.pop(said.host, None)
        if said.hypervisor_ok and (now != before or said.shut):
            # One that is here as it was when it was looked at last, by another conductor perhaps, has time.
            as_it_was = before is None and self._boots.get(said.host, said.boot_id) == said.boot_id
            self._put(said.host, new=said.shut or not as_it_was)

    async def _on_event(self, message: Message) -> None:
        event = msgspec.msgpack.decode(message.body, type=HostEvent)
        self._events.put(event.host, event.event.instance_id)

    async def _on_leftovers(self, message: Message) -> None:
        # A moment later: the operation that tells of them is not at its end yet, and its instance is still its own.
        asyncio.get_running_loop().call_later(BUSY_RETRY_S, self._put, message.body.decode())

    async def _on_timer(self) -> None:
        while True:
            for work in (self.settle_database, self._prune):  # what fails again and again stops only itself
                try:
                    await work()
                except Exception:
                    log.exception("reconcile.failed")
            await asyncio.sleep(self._settings.power_sync_s)
            for host, (_, _, hypervisor_ok) in self._seen.items():
                if hypervisor_ok and time.monotonic() - self._checked.get(host, 0) >= self._settings.power_sync_s:
                    self._put(host, new=False)

    def _put(self, host: str, *, new: bool = True) -> None:
        self._looks.put(host, new=new)

    async def _work(self) -> None:
        while True:
            host = await self._looks.next()
            try:
                await self._look_at(host)
            finally:
                self._looks.done(host)

    async def _look_at(self, host: str) -> None:
        try:
            # Not even asked: of those who look each would wait long for an answer, and hosts that came back for them.
            if self._cloud.scheduler.is_silent(host):
                raise HostUnreachable(host=host)
            await self.reconcile_host(host)
            self._away.discard(host)
        except InstarError as error:
            # Once for each silence: it is tried every few seconds.
            tell = log.debug if host in self._away else log.warning
            tell("reconcile.host_away", host=host, reason=error.message)
            self._away.add(host)
            # One that reports to be away is looked at when it reports to be back; others were away between two reports.
            if self._seen.get(host, ("", "", False))[2]:
                asyncio.get_running_loop().call_later(AWAY_RETRY_S, self._put, host)
        except Exception:
            log.exception("reconcile.failed", host=host)

    async def _sync_guest(self, host: str, instance_id: str) -> bool:
        """False: an operation is in flight, come again."""
        try:
            instance = await instance_fetch(self._cloud.store, instance_id)
        except NotFound:
            return True
        if instance.maybe_on is not None:
            self._put(host)
            return True
        if instance.terminated_at is not None or (instance.host != host and instance.task_state is None):
            return True
        if instance.task_state is not None:
            return False
        state = await self._client().observe_of(host, instance.id)
        await sync(self._cloud, instance, state)
        return True

    # --- what it does -----------------------------------------------------------------------------------------------

    async def reconcile_host(self, host: str) -> None:
        """Everything about one host: restart its guests when it was restarted, sync the rest, remove leftovers."""
        self._checked[host] = time.monotonic()
        # Records that are changed come from before the census: an operation begun meanwhile makes the change void. Owners
        # come from after it: what a new operation has made meanwhile has its record by then.
        instances = await instances_about_host(self._cloud.store, host)
        census = await self._client().census(host)
        known = await audit_instances_among(self._cloud.store, mentioned(census))
        if (session := self._shut.get(host)) is not None:
            await self._admit(host, session, leftovers(host, census, known))
        # By the census itself: a host that came back may answer before its first report is here.
        restarted = self._was_restarted(host, census.boot_id)
        for instance in instances:
            if instance.maybe_on:
                await self._find(instance, host)
                continue
            state = census.guests.get(instance.id, GuestState(exists=False))
            if restarted and _should_run(instance, state):
                await self._resume(instance)
            elif _should_be_off(instance, state):
                await self._end_guest(instance, host)
            else:
                await sync(self._cloud, instance, state)
        for finding in leftovers(host, census, known):
            try:
                await self._remove_leftover(finding)
            except HostNotReady:  # it answered before its first report was here: it is admitted by the next look
                raise
            except InstarError as error:  # the others are seen to all the same; this one by the next look
                log.warning("reconcile.leftover_stays", instance=finding.subject, host=host, reason=error.message)
        if restarted is not None:
            await self._cloud.store.write(host_boot_save(host, census.boot_id))
            self._boots[host] = census.boot_id

    async def _admit(self, host: str, session: int, findings: Iterable[Finding]) -> None:
        """A host that was cut off removes what is not its own any more, before anything else is done there."""
        # Those first that are on their way: what was accepted before this host answered again is among them.
        evacuated = await instances_evacuated(self._cloud.store, host)
        departed = [Departed(instance_id, epoch, keep_disks=True) for instance_id, epoch in evacuated.items()]
        for finding in findings:
            if finding.kind not in (Kind.GUEST, Kind.DISKS, Kind.PLUGS):
                continue
            try:
                gone = finding.kind is not Kind.GUEST or await self._is_elsewhere(finding.subject)
            except InstarError as error:  # it may be the only one; and one host does not wait for another to be let in
                log.warning("reconcile.leftover_stays", instance=finding.subject, host=host, reason=error.message)
                continue
            if gone:
                departed.append(Departed(finding.subject, finding.epoch))
        log.info("reconcile.admits", host=host, departed=len(departed))
        await self._client().admit(host, session, tuple(departed))
        if self._shut.get(host) == session:
            del self._shut[host]

    def _was_restarted(self, host: str, boot_id: str) -> bool | None:
        """None: the same start of the machine as last time."""
        before = self._boots.get(host)
        if not boot_id or before == boot_id:
            return None
        return before is not None and self._settings.resume_guests_on_boot

    async def _find(self, instance: Instance, answered: str) -> None:
        """A guest that is on one of two hosts: once these have said enough, the record is made to say where."""
        dest = instance.maybe_on
        if instance.task_state is not None or instance.host is None or dest is None:
            return
        hosts = (instance.host, dest)
        states = await asyncio.gather(*(self._said_by(host, instance.id, host == answered) for host in hosts))
        if side_of(*states, was_paused=instance.power_state is PowerState.PAUSED) is None:
            log.warning("reconcile.guest_not_found", instance=instance.id, host=instance.host, maybe_on=dest)
            if None not in states:  # something of it comes to its end just now
                asyncio.get_running_loop().call_later(AWAY_RETRY_S, self._put, answered)
            return
        try:
            await self._lifecycle.find_guest(system_context(instance), instance, FindArguments())
        except InstarError as error:  # an operation was begun meanwhile
            log.info("reconcile.guest_not_looked_for", instance=instance.id, reason=error.message)

    async def _said_by(self, host: str, instance_id: str, answers: bool) -> GuestState | None:
        """None: the host does not answer. One that is down is not even asked: a broker may keep the question for long."""
        if not answers and not self._cloud.scheduler.is_up(host):
            return None
        try:
            return await self._client().observe_of(host, instance_id)
        except InstarError as error:
            log.info("reconcile.host_away", host=host, reason=error.message)
            return None

    async def _resume(self, instance: Instance) -> None:
        """A hard reboot brings back domain, networks and taps, with the disks as they are."""
        log.info("host.resumes_guest", instance=instance.id, host=instance.host)
        try:
            await self._lifecycle.reboot(system_context(instance), instance, hard=True)
        except InstarError as error:
            log.warning("host.guest_not_resumed", instance=instance.id, reason=error.message)

    async def _end_guest(self, instance: Instance, host: str) -> None:
        """Under the epoch of the last operation: one that begins meanwhile is stronger."""
        log.warning("reconcile.ends_guest", instance=instance.id, host=host, vm_state=instance.vm_state.value)
        try:
            await self._client(instance.id, instance.epoch).ensure_stopped(host, 0.0)
        except StaleEpoch:
            log.info("reconcile.guest_is_busy", instance=instance.id, host=host)
        except HostNotReady:
            raise
        except InstarError as error:  # its process may not end for long: the others are seen to all the same
            log.warning("reconcile.guest_not_ended", instance=instance.id, host=host, reason=error.message)

    async def _remove_leftover(self, finding: Finding) -> None:
        if finding.kind not in (Kind.GUEST, Kind.DISKS, Kind.ASIDE, Kind.PLUGS) or finding.host is None:
            return
        log.warning("reconcile.leftover", kind=finding.kind.value, instance=finding.subject, host=finding.host)
        client = self._client(finding.subject, finding.epoch)
        if finding.kind is Kind.ASIDE:
            await client.ensure_nothing_aside(finding.host)
        elif finding.kind is Kind.PLUGS:
            await client.ensure_no_ports(finding.host)
        elif finding.kind is Kind.DISKS or await self._is_elsewhere(finding.subject):
            await client.ensure_absent(finding.host)

    async def _is_elsewhere(self, instance_id: str) -> bool:
        """A guest on a host that its record does not name may go, unless it is the only one that there is."""
        try:
            instance = await instance_fetch(self._cloud.store, instance_id)
        except NotFound:
            return True
        if instance.terminated_at is not None or instance.host is None or instance.vm_state not in KEPT_RUNNING:
            return True
        if not self._cloud.scheduler.is_up(instance.host):  # a broker might keep the question for long
            raise HostUnreachable(host=instance.host)
        state = await self._client().observe_of(instance.host, instance_id)
        if state.domain_id is None:
            log.error("reconcile.only_guest_is_elsewhere", instance=instance_id, host=instance.host)
        return state.domain_id is not None

    async def settle_database(self) -> list[Finding]:
        """Repair what is wrong in the records alone. Returns what was found."""
        findings = await audit(self._cloud, [])
        # Between the queuing of an image and the record of its operation is a moment: what is seen twice is nobody's.
        seen = {finding.subject for finding in findings if finding.kind is Kind.UPLOAD}
        for finding in findings:
            log.warning("reconcile.found", kind=finding.kind.value, subject=finding.subject, host=finding.host)
            try:
                await self._repair(finding)
            except InstarError as error:
                database_away = isinstance(error, Unavailable) and not isinstance(error, StorageAway)
                if database_away or isinstance(error, KeeperLost):
                    raise
                # The others are seen to all the same; this one by the next look.
                log.warning("reconcile.not_repaired", subject=finding.subject, reason=error.message)
            except Exception:
                log.exception("reconcile.not_repaired", subject=finding.subject)
        self._uploads_seen = seen
        # The same of volumes that are reserved, and of new ports.
        self._taken_seen = {one.subject for one in findings if one.kind in (Kind.RESERVATION, Kind.NEW_PORT)}
        return findings

    async def _repair(self, finding: Finding) -> None:
        if finding.kind is Kind.CLAIM:
            await self._cloud.scheduler.release(finding.subject)
        elif finding.kind is Kind.PORT:
            owner = (await self._cloud.networks.port_owners()).get(finding.subject)
            if owner is not None:
                await self._cloud.networks.release(owner)
        elif finding.kind is Kind.NEW_PORT and finding.subject in self._taken_seen:
            owner = (await self._cloud.networks.port_owners()).get(finding.subject)
            if owner is not None:
                await self._cloud.networks.release_port(owner, finding.subject)
        elif finding.kind is Kind.ATTACHMENT or finding.subject in self._taken_seen:
            await self._cloud.volumes.detach(finding.subject)
        elif finding.kind is Kind.UPLOAD and finding.subject in self._uploads_seen:
            await self._cloud.images.discard(finding.subject)
        elif finding.kind is Kind.EXPORT:
            await self._cloud.volumes.stop_serving(finding.subject)
        elif finding.kind is Kind.HOST_TOTALS:
            await self._cloud.store.write(*host_totals_recount(finding.subject))
        elif finding.kind is Kind.USAGE:
            await self._cloud.store.write(*usage_recount(finding.subject))

    async def _prune(self) -> None:
        """Records of instances that were deleted long ago go, so that the database does not grow for ever."""
        keep_us = self._cloud.settings.engine.journal_keep_days * DAY_US
        if time.monotonic() - self._pruned >= PRUNE_EVERY_S:
            self._pruned = time.monotonic()
            await self._cloud.store.write(*operations_prune(now_us() - keep_us))

    def _client(self, instance_id: str = "", epoch: int = 0) -> HostClient:
        return HostClient(
            self._cloud.bus, instance_id=instance_id, epoch=epoch, deadline_s=HOST_DEADLINE_S, waits_for_admission=False
        )


def _should_be_off(instance: Instance, state: GuestState) -> bool:
    """It was deleted, to be restored perhaps, while its host was away, or a failed unshelve could not take it back."""
    runs = state.power_state in (PowerState.RUNNING, PowerState.PAUSED)
    return instance.task_state is None and instance.vm_state in KEPT_OFF and runs


def _should_run(instance: Instance, state: GuestState) -> bool:
    idle = instance.task_state is None and instance.vm_state is VmState.ACTIVE
    return idle and state.power_state is not PowerState.RUNNING
