"""The host table: every host in memory, kept fresh by heartbeats, so that choosing one needs no query.

Whether a host is up is judged by the receiver's own clock alone, while it listens. Amounts are hints, read again every few
seconds; what may be claimed is decided by the database. Reports reach the database in groups, not one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Awaitable, Callable, Coroutine

import msgspec
import structlog

from instar.bus.contract import Bus, Message, Subscription
from instar.clock import now_us
from instar.config import Settings
from instar.errors import InstarError
from instar.model.commands import HOST_QUEUE
from instar.model.guest import HostInventory
from instar.model.host import HOST_REPORTS, HOST_REPORTS_TOGETHER, HostReport, HostReports
from instar.scheduling.awake_clock import AwakeClock
from instar.scheduling.host_view import HostView, Recorded, capacity_of, groupings
from instar.scheduling.ranking import Ranking
from instar.store.aggregates import aggregate_list
from instar.store.contract import Statement, Store
from instar.store.hosts import host_busy_list, host_list, host_report, host_totals_list, host_touch

log = structlog.get_logger()

PERSIST_EVERY_S = 2.0  # what is new in reports is written so soon
TOUCH_EVERY_S = 30.0  # that a host still reports is written no more often: for people, nothing is decided by it
PERSIST_AT_ONCE = 500  # new or changed hosts in one transaction
REFRESH_EVERY_S = 2.0  # what others claimed and admins said is read again
SWEEP_EVERY_S = 0.5  # silence is noticed so late at most
TICK_PART = 0.1  # of the time after which a silent host is down: so often we see whether we run ourselves
SLICE = 500  # hosts that are worked on before others have the event loop

_decode_report = msgspec.msgpack.Decoder(HostReport).decode
_decode_reports = msgspec.msgpack.Decoder(HostReports).decode
_decode_inventory = msgspec.msgpack.Decoder(HostInventory).decode
Clock = Callable[[], float]


class HostChange(msgspec.Struct, frozen=True):
    """`change`: up, down, restarted (the machine was started anew since its report before)."""

    host: str
    change: str


class HostTable:
    """All hosts. `open` loads them and follows the reports; `watch` tells of hosts that come and go."""

    def __init__(self, store: Store, settings: Settings, *, clock: Clock | None = None) -> None:
        self.ranking = Ranking(settings.scheduling, settings.host.commands_max)
        self._store = store
        self._settings = settings
        self._clock = clock or time.monotonic
        self._clock_given = clock is not None
        self._hosts: dict[str, HostView] = {}
        self._stored: set[str] = set()  # hosts that have their row, without which nothing can be claimed on them
        self._changed: dict[str, HostInventory] = {}  # not yet written
        self._heard: set[str] = set()  # reported since the last writing, and touched long ago
        self._touched: dict[str, float] = {}  # when that a host reports was written last
        self._watchers: list[Callable[[HostChange], None]] = []
        self._new_host = asyncio.Event()
        self._bus: Bus | None = None
        self._subscriptions: list[Subscription] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._writing = asyncio.Lock()
        self.answer: Callable[[HostReport], Awaitable[None]] | None = None  # to reports that ask, see engine/hearing.py
        self.persister = HostPersister(self)  # for the one process that writes what hosts report

    async def open(self, bus: Bus) -> None:
        """Load every known host (none is up before it has reported), then follow reports until `close`."""
        awake = AwakeClock(bus.listening_s, tick_s=min(SWEEP_EVERY_S, self._settings.host.down_after_s * TICK_PART))
        if not self._clock_given:
            self._clock = awake  # while we are cut off, or do not run, nobody falls silent
        self._bus = bus
        await self.load()
        self._subscriptions = [
            await bus.subscribe(HOST_REPORTS, self._on_report),
            await bus.subscribe(HOST_REPORTS_TOGETHER, self._on_reports),
        ]
        self._tasks = [
            asyncio.create_task(awake.run(), name="host clock"),
            asyncio.create_task(self._every(REFRESH_EVERY_S, self.refresh), name="host refresh"),
            asyncio.create_task(self._every(SWEEP_EVERY_S, self._sweep_soon), name="host sweep"),
        ]

    async def close(self) -> None:
        """Stop following."""
        for subscription in self._subscriptions:
            await subscription.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- questions --------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._clock()

    def get(self, name: str) -> HostView | None:
        return self._hosts.get(name)

    def names(self) -> list[str]:
        return sorted(self._hosts)

    def is_up(self, name: str) -> bool:
        """Up by this moment's clock."""
        host = self._hosts.get(name)
        return host is not None and host.hears(self._clock(), self._settings.host.down_after_s)

    def states(self) -> dict[str, int]:
        """How many hosts are up (and enabled), disabled (and up), down: for the metrics."""
        counts = {"up": 0, "disabled": 0, "down": 0}
        for host in self._hosts.values():
            counts["down" if not host.is_up else "disabled" if host.disabled else "up"] += 1
        return counts

    def session_of(self, name: str) -> int:
        """The session that the host is in, as far as this process has heard; 0: it has not."""
        host = self._hosts.get(name)
        return host.session if host is not None else 0

    def is_forced_down(self, name: str) -> bool:
        """An admin said so, who knows better than reports."""
        host = self._hosts.get(name)
        return host is not None and host.forced_down

    def fell_silent(self, name: str, waited_s: float) -> bool:
        """Whether operations that need the host give up: an admin said that it is down, or nothing was heard of it for so
        long. One that was not heard yet since this process began gets that time from when someone began to wait for it."""
        return self.is_forced_down(name) or self.is_silent(name, waited_s)

    def is_silent(self, name: str, waited_s: float = 0.0) -> bool:
        """The same, whatever an admin said."""
        host = self._hosts.get(name)
        heard = host.reported_at if host is not None else None
        silence_s = waited_s if heard is None else self._clock() - heard
        return silence_s > self._settings.host.lost_after_s

    def watch(self, callback: Callable[[HostChange], None]) -> None:
        """Call on the event loop for each host that comes up, goes down, or was restarted."""
        self._watchers.append(callback)

    # --- what comes in ----------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Every host that the database knows, with what is claimed on it."""
        await self._load_stored()
        await self.refresh()

    async def _load_stored(self) -> None:
        for number, row in enumerate(await host_list(self._store)):
            host = self._hosts.setdefault(row["name"], HostView(row["name"]))
            self._stored.add(host.name)
            if host.inventory is None:
                host.inventory = _decode_inventory(row["inventory"])
                host.capacity = capacity_of(host.inventory, self._settings.host, self._settings.scheduling)
                host.take(Recorded.of(row, 0, None))
                self.ranking.put(host)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)

    async def _on_report(self, message: Message) -> None:
        await self._take_report(_decode_report(message.body))

    async def _on_reports(self, message: Message) -> None:
        for report in _decode_reports(message.body).reports:
            await self._take_report(report)
        await asyncio.sleep(0)  # many such messages may wait

    async def _take_report(self, report: HostReport) -> None:
        self.hear(report)
        if report.ask and self.answer is not None:
            await self.answer(report)

    def hear(self, report: HostReport) -> None:
        """A host says that it lives. Its own clock has no part in this."""
        host = self._hosts.get(report.host)
        if host is None:
            if report.inventory is None:
                return  # nothing to schedule on, and no row to make of it: wait until its hypervisor answers
            host = self._hosts[report.host] = HostView(report.host)
        if report.inventory is not None and report.inventory != host.inventory:
            self._take_inventory(host, report.inventory)
        host.hypervisor_ok, host.shut, host.session = report.hypervisor_ok, report.shut, report.session
        host.agent_version, host.protocol = report.agent_version, report.protocol
        host.reported_at = now = self._clock()
        if report.hypervisor_ok:
            host.heard_at = now
            if now - self._touched.get(host.name, float("-inf")) >= TOUCH_EVERY_S:
                self._heard.add(host.name)
        restarted = bool(host.boot_id) and host.boot_id != report.boot_id
        host.boot_id, host.agent_id = report.boot_id, report.agent_id
        if restarted:
            self._tell(host, "restarted")
        self._judge(host, now)

    def _take_inventory(self, host: HostView, inventory: HostInventory) -> None:
        host.inventory = inventory
        host.set_amounts(capacity_of(inventory, self._settings.host, self._settings.scheduling), host.totals)
        self._changed[host.name] = inventory
        if host.name not in self._stored:
            self._new_host.set()
        else:
            self.ranking.put(host)

    def note_claim(self, name: str, amounts: tuple[int, int, int], *, count: int = 1) -> None:
        """Our own claim (count 1) or release (-1) of vcpus, MiB and GiB: seen at once, without a query."""
        host = self._hosts.get(name)
        if host is None:
            return
        before = host.totals
        totals = (before[0] + count * amounts[0], before[1] + count * amounts[1], before[2] + count * amounts[2])
        host.set_amounts(host.capacity, totals)
        host.instances += count
        host.busy = max(0, host.busy + count)
        host.recorded = None  # whatever the database says next is newer
        self.ranking.put(host)

    async def forget(self, name: str) -> None:
        """An admin deleted the host: of one that does not report any more nothing remains, its queue neither."""
        if self._bus is not None and self.is_silent(name):
            await self._bus.forget(HOST_QUEUE + name)
        await self.refresh()

    async def refresh(self) -> None:
        """Read again what others may have changed: claims, what admins said, aggregates, operations in flight."""
        stored = set(self._stored)
        rows = await host_totals_list(self._store)
        busy = await host_busy_list(self._store)
        grouped = groupings(await aggregate_list(self._store))
        names, all_known = set(), True
        for number, row in enumerate(rows):
            name = row["name"]
            names.add(name)
            host = self._hosts.get(name)
            if host is None or host.inventory is None:
                all_known = False
            elif (recorded := Recorded.of(row, busy.get(name, 0), grouped.get(name))) != host.recorded:
                host.take(recorded)
                self.ranking.put(host)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        if not all_known:
            await self._load_stored()  # others have written hosts that did not report here
        self._stored |= names
        for name in stored - names:  # forgotten by an admin: it comes back as a new one if it still reports
            self._stored.discard(name)
            self._touched.pop(name, None)
            forgotten = self._hosts.pop(name, None)  # another refresh at the same time may have been quicker
            if forgotten is not None:
                self.ranking.remove(forgotten)

    # --- up and down ------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Notice hosts that fell silent."""
        now = self._clock()
        for host in self._hosts.values():
            if host.is_up:
                self._judge(host, now)

    async def _sweep_soon(self) -> None:
        self.sweep()

    def _judge(self, host: HostView, now: float) -> None:
        up = host.hears(now, self._settings.host.down_after_s)
        if up is not host.is_up:
            host.is_up = up
            self._tell(host, "up" if up else "down")

    def _tell(self, host: HostView, change: str) -> None:
        tell = log.warning if change == "down" else log.debug  # thousands come up at a start
        tell(f"host.{change}", host=host.name)
        for watcher in self._watchers:
            watcher(HostChange(host.name, change))

    # --- to the database --------------------------------------------------------------------------------------------

    async def persist(self) -> None:
        """Write what reports brought: new and changed hosts with their inventory, of all others only that they live."""
        async with self._writing:
            changed, self._changed = self._changed, {}
            heard, self._heard = self._heard, set()
            try:
                for start in range(0, len(changed), PERSIST_AT_ONCE):
                    await self._write_changed(dict(list(changed.items())[start : start + PERSIST_AT_ONCE]))
                for touched in host_touch(sorted((heard & self._stored) - changed.keys()), now_us()):
                    await self._store.write(touched)  # each for itself: claims on these hosts wait no longer than for one
                self._touched |= dict.fromkeys((heard & self._stored) | changed.keys(), self._clock())
            except Exception:
                self._changed = changed | self._changed  # what came meanwhile is newer
                self._heard |= heard
                raise

    async def _write_changed(self, changed: dict[str, HostInventory]) -> None:
        now = now_us()
        statements: list[Statement] = []
        for name, inventory in changed.items():
            capacity = capacity_of(inventory, self._settings.host, self._settings.scheduling)
            statements.append(host_report(name, inventory, capacity, now))
        await self._store.write(*statements)
        for name in changed:
            host = self._hosts.get(name)  # None: forgotten meanwhile; the next refresh reads what was written just now
            if host is not None:
                self._stored.add(name)
                self.ranking.put(host)

    async def persist_new(self) -> None:
        """Only hosts that have no row yet: for a process that does not write what is reported, but needs to claim."""
        async with self._writing:
            new = {name: inventory for name, inventory in self._changed.items() if name not in self._stored}
            if new:
                await self._write_changed(new)

    async def persist_for_ever(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERSIST_EVERY_S):
                    await self._new_host.wait()
            self._new_host.clear()
            await self._safely(self.persist)

    async def _every(self, pause_s: float, work: Callable[[], Coroutine[None, None, None]]) -> None:
        while True:
            await asyncio.sleep(pause_s)
            await self._safely(work)

    async def _safely(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """The edge of a loop: what fails now is tried again the next time."""
        try:
            await work()
        except Exception:
            log.exception("host_table.failed")
            await asyncio.sleep(1)


class HostPersister:
    """Writes what a table hears, while it is open: one process does it for all. Every table hears for itself."""

    def __init__(self, table: HostTable) -> None:
        self._table = table
        self._task: asyncio.Task[None] | None = None
        self._context = contextvars.copy_context()

    async def open(self) -> None:
        self._context = contextvars.copy_context()  # with the guard under which this is done
        self._task = asyncio.create_task(self._table.persist_for_ever(), name="host reports")

    async def close(self) -> None:
        """What was reported is written, by who may still do it: another process may have written what is newer."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        with contextlib.suppress(InstarError):  # the database is away: the hosts will report again
            await asyncio.create_task(self._table.persist(), context=self._context)
